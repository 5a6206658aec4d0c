"""A writer that is killed at any point loses nothing that it acknowledged, and leaves nothing torn."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mem_triton.store.bank import Bank, BankError
from tests.store import bank_case
from tests.store.kill_writer import seed_of, text_of

ROOT = Path(__file__).parents[2]
SILENCE = 300.0
"""Seconds that a writer may say nothing: its machine may be busy, and its first one imports torch."""
WORDS = 16
"""Words of a writer behind which it dies at the latest."""


class Killer:
    """Lets writers run on a bank and kills them; keeps what they acknowledged."""

    def __init__(self, path: Path, fault: str = "", seed: int = 0) -> None:
        self.path, self.random = path, random.Random(seed)
        Bank.create(path, bank_case.spec()).close()
        command = [sys.executable, "-m", "tests.store.kill_writer", str(path), *([fault] if fault else [])]
        self.nursery = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.next, self.revision, self.orphans, self.kills = 0, 0, 0, 0
        self.acknowledged: set[str] = set()
        self.cold: set[str] = set()
        self.doomed: set[str] = set()  # perhaps deleted
        self.gone: set[str] = set()
        self.compacted = False  # superseded versions may have been dropped

    def kill_one(self) -> None:
        """Start a writer, let it say some words, kill it a moment later, and take down what it said.

        It is killed by what it has done and not by the clock: on a busy machine a tenth of a second passes without a
        single change.
        """
        assert self.nursery.poll() is None, f"the process that starts writers ended with {self.nursery.returncode}"
        self.nursery.stdin.write(f"{self.next}\n")
        pid = self._hear(0)
        words = 0 if self.random.random() < 0.1 else self.random.randint(1, WORDS)  # one in ten dies as it opens it
        for _ in range(words):
            before, pid = pid, self._hear(pid)
            assert pid, f"writer {before} ended by itself after {self.kills} kills"
        time.sleep(self.random.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        while pid:
            pid = self._hear(pid)
        self.next += 1
        self.kills += 1

    def _hear(self, pid: int) -> int:
        """Take down one word; the writer that lives, 0 for none."""
        silence = threading.Timer(SILENCE, self.nursery.kill)  # so that a test that waits for nothing ends
        silence.start()
        line = self.nursery.stdout.readline()
        silence.cancel()
        assert line, f"no word in {SILENCE:.0f} s, or the process that starts writers has ended"
        word, _, what = line.strip().partition(" ")
        if word == "pid":
            pid = int(what)
        elif word == "dead":
            pid = 0
        elif word == "at":
            self.next = int(what)
        elif word == "compacting":
            self.compacted = True
        elif word in ("has", "cold", "doomed", "gone"):
            {"has": self.acknowledged, "cold": self.cold, "doomed": self.doomed, "gone": self.gone}[word].add(what)
        elif word not in ("ready", "compacted"):
            raise AssertionError(f"the writer failed: {word!r} {what}")
        return pid

    def problems(self) -> Iterator[str]:
        """What is not as it was acknowledged; torn, wrong or half a batch."""
        with Bank.open(self.path) as bank:
            yield from bank.verify()
            if bank.revision < self.revision:
                yield f"revision {bank.revision} after {self.revision}"
            self.revision = bank.revision
            self.orphans += bank.stats()["orphans"]
            here = {info.id: info for info in pages(bank)}
            for info in here.values():
                yield from self._differences(bank, info.ref)
                number, dot, i = info.id.partition(".")
                if dot and i != "0" and f"{number}.{3 - int(i)}" not in here:
                    yield f"{info.id} is there without {number}.{3 - int(i)}"
            for ref in self.acknowledged | self.cold:
                id, _, version = ref.partition("@")
                superseded = id in here and here[id].version > int(version)
                if ref in self.gone:
                    if bank.knows(ref):
                        yield f"{ref} was deleted and is there"
                elif not (ref in self.doomed or (superseded and self.compacted)):
                    if not bank.knows(ref):
                        yield f"{ref} was acknowledged and is lost"
                    elif ref in self.acknowledged and not bank.resolve(ref).has_block:
                        yield f"{ref} was filled and is cold"
                    elif superseded:
                        yield from self._differences(bank, ref)

    @staticmethod
    def _differences(bank: Bank, ref: str) -> Iterator[str]:
        info = bank.resolve(ref)
        if info.text != text_of(info.id, info.version) or info.metadata != {"n": info.version}:
            yield f"{ref} has the text {info.text!r}"
        try:
            if info.has_block and not bank_case.equal(bank.load(ref), bank_case.block(seed_of(info.id, info.version))):
                yield f"{ref} has another block"
        except (BankError, ValueError, OSError) as error:
            yield f"{ref}: {error}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.nursery.stdin.close()
        self.nursery.wait(20)


def pages(bank: Bank) -> Iterator:
    page = bank.list(limit=200)
    while page:
        yield from page
        page = bank.list(after=page[-1].id, limit=200)


@pytest.fixture
def killers() -> Iterator[list[Killer]]:
    made: list[Killer] = []
    yield made
    for killer in made:
        killer.close()


def kill_often(killer: Killer, times: int) -> None:
    for _ in range(times):
        killer.kill_one()
        assert list(killer.problems()) == [], f"after {killer.kills} kills"
    assert len(killer.acknowledged) > times, "the writers hardly wrote"
    with Bank.open(killer.path, writable=True) as bank:  # orphans go, and nothing else
        bank.compact()
        assert bank.stats()["orphans"] == 0 and bank.stats()["superseded"] == 0
    killer.compacted = True
    assert list(killer.problems()) == []


def test_nothing_acknowledged_is_lost(tmp_path, killers):
    killers.append(Killer(tmp_path / "bank"))
    kill_often(killers[0], 30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_nothing_acknowledged_is_lost_in_a_long_run(tmp_path, killers, seed):
    killers.append(Killer(tmp_path / "bank", seed=seed))
    kill_often(killers[0], 250)
    assert killers[0].orphans > 0, "no kill came between a shard and its commit"


@pytest.mark.parametrize(
    ("fault", "sign"),
    [("late-shard", "is missing"), ("torn-shard", r"bytes, expected"), ("early-word", "was acknowledged and is lost")],
)
def test_a_faulty_writer_is_seen(tmp_path, killers, fault, sign):
    """Negative control: the kill test goes red for a writer that commits too early or speaks too early."""
    killer = Killer(tmp_path / "bank", fault)
    killers.append(killer)
    found: list[str] = []
    while not found and killer.kills < 40:
        killer.kill_one()
        found = list(killer.problems())
    assert any(re.search(sign, problem) for problem in found), found


def test_shards_are_durable_before_the_commit_that_names_them(tmp_path, monkeypatch):
    """A power cut, which no test can make: the order of the calls that guard against it."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(handle: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        fsync(handle)

    def traced_replace(source: object, target: object) -> None:
        calls.append("rename")
        replace(source, target)

    with Bank.create(tmp_path / "bank", bank_case.spec()) as bank:
        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "replace", traced_replace)
        bank.catalogue.db.set_trace_callback(lambda sql: calls.append(sql) if sql == "COMMIT" else None)
        bank.add([bank_case.entry("a", 1)])
        assert bank.catalogue.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: the commit itself is synced
        assert bank.catalogue.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert calls[:4] == ["sync file", "rename", "sync folder", "COMMIT"]


def test_an_unfinished_creation_can_be_done_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "mem_triton.store.bank.opened.write_durably", lambda *_: (_ for _ in ()).throw(OSError("power cut"))
        )
        with pytest.raises(OSError, match="power cut"):
            Bank.create(tmp_path / "bank", bank_case.spec())
    with pytest.raises(BankError, match="is no memory bank"):
        Bank.open(tmp_path / "bank")
    Bank.create(tmp_path / "bank", bank_case.spec()).close()
    Bank.open(tmp_path / "bank").close()


def test_a_failing_commit_changes_nothing(tmp_path):
    """The disk is full, or the like: the error arrives, the bank is as it was, and the next write works."""
    with Bank.create(tmp_path / "bank", bank_case.spec()) as bank:
        bank.add([bank_case.entry("a", 1)])
        bank.catalogue.db.execute(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON main.vectors WHEN (SELECT count(*) FROM main.entries) > 1 "
            "BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
        )
        with pytest.raises(BankError, match="disk is full; nothing was changed"):
            bank.add([bank_case.entry("b", 1), bank_case.entry("c", 1)])
        bank.catalogue.db.execute("DROP TRIGGER full")
        assert [info.ref for info in bank.list()] == ["a@1"] and bank.revision == 1 and bank.verify() == []
        assert bank.stats()["orphans"] == 1
        assert bank.add([bank_case.entry("b", 1)]) == ["b@1"]
        bank.compact()
        assert bank.stats()["orphans"] == 0 and bank.verify() == []


def test_a_catalogue_that_is_gone_is_named(tmp_path):
    Bank.create(tmp_path / "bank", bank_case.spec()).close()
    (tmp_path / "bank" / "catalogue.sqlite").unlink()
    with pytest.raises(BankError, match=r"catalogue\.sqlite is missing"):
        Bank.open(tmp_path / "bank")
    sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite").close()
    with pytest.raises(BankError, match=r"catalogue\.sqlite: no such table"):
        Bank.open(tmp_path / "bank")
