"""Processes to be killed: each changes a bank without end, and says on stdout what is committed, once it is.

    python -m tests.store.kill_writer BANK [fault]

Change n is a batch of added entries, an update, a fill, a delete or a compact; see ``change``. fault: a mistake that
the kill test must see. Writers are forked from one process, so that starting one costs milliseconds.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback

from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.bank.shards import Shard, Shards
from tests.store.bank_case import block


def text_of(id: str, version: int) -> str:
    return f"The locker of {id} is number {version} in a row of {hash_of(id)}."


def hash_of(id: str) -> int:
    return sum(map(ord, id)) % 997


def seed_of(id: str, version: int) -> int:
    return random.Random(f"{id}@{version}").randrange(1 << 30)


def entry(id: str, version: int, cold: bool = False) -> NewEntry:
    return NewEntry(id, text_of(id, version), None if cold else block(seed_of(id, version)), metadata={"n": version})


def say(word: str) -> None:
    """A line in one write: killed between a word and its end, a writer would leave half a line for the next word."""
    os.write(sys.stdout.fileno(), f"{word}\n".encode())


def change(bank: Bank, n: int) -> None:
    kind = n % 8
    if kind in (0, 1, 2):
        ids = [f"e{n}.{i}" for i in range(3)]
        for ref in bank.add([entry(id, 1) for id in ids]):
            say(f"has {ref}")
    elif kind == 3:
        (ref,) = bank.add([entry(f"c{n}", 1, cold=True)])
        say(f"cold {ref}")
        bank.fill(ref, block(seed_of(f"c{n}", 1)))
        say(f"has {ref}")
    elif kind in (4, 5):
        id = f"u{n // 8 % 4}"  # four ids that are updated again and again
        if bank.knows(id):
            version = bank.resolve(id).version + 1
            say(f"has {bank.update(id, entry(id, version))}")
        else:
            say(f"has {bank.add([entry(id, 1)])[0]}")
    elif kind == 6:
        id = f"e{n - 6}.0"
        if bank.knows(id):
            say(f"doomed {id}@1")
            bank.delete(id)
            say(f"gone {id}@1")
    elif n % 24 == 23:
        say("compacting")
        bank.compact()
        say("compacted")


def late_shard() -> None:
    """A shard gets its name a while after the commit that refers to it."""
    write = Shards._write

    def write_late(self: Shards, rows: list) -> Shard:
        shard = write(self, rows)
        path, hidden = self.folder / shard.name, self.folder / f".late-{shard.name}"
        path.rename(hidden)
        threading.Timer(0.05, hidden.rename, [path]).start()
        return shard

    Shards._write = write_late


def torn_shard() -> None:
    """The second half of a shard is written a while after the commit that refers to it."""
    write = Shards._write

    def write_torn(self: Shards, rows: list) -> Shard:
        shard = write(self, rows)
        path = self.folder / shard.name
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 2)
        threading.Timer(0.05, path.write_bytes, [whole]).start()
        return shard

    Shards._write = write_torn


def early_word() -> None:
    """Entries are acknowledged before they are committed."""
    add = Bank.add

    def add_later(self: Bank, entries: list[NewEntry]) -> list[str]:
        for e in entries:
            say(f"has {e.id}@1")
        time.sleep(0.02)
        return add(self, entries)

    Bank.add = add_later


FAULTS = {"late-shard": late_shard, "torn-shard": torn_shard, "early-word": early_word}


def write_for_ever(path: str, n: int) -> None:
    with Bank.open(path, writable=True) as bank:
        say("ready")
        while True:
            say(f"at {n}")
            change(bank, n)
            n += 1


def main(path: str, fault: str = "") -> None:
    """Start a writer for each line of stdin, which is the number of its first change; wait for its death."""
    if fault:
        FAULTS[fault]()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                say(f"pid {os.getpid()}")
                write_for_ever(path, int(line))
            finally:
                traceback.print_exc()
                os._exit(1)
        os.waitpid(pid, 0)
        say("dead")


if __name__ == "__main__":
    main(*sys.argv[1:])
