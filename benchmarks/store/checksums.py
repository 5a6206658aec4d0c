"""Times a reference's load with and without the comparison with its checksums, in pairs, one thread.

    python -m benchmarks.store.checksums [--pairs 50] [--entries 24] [--save] [--json FILE]

A load reads one entry from the bank, with a warm page cache, rotates it to its place, packs it into pages and compares
it, as a worker does. "first": every load is compared, as the first one of an entry is. "later": one of eight is, as of
entries that are loaded again. A pair is eight loads with and eight without the comparison, in turns first; the ratio
does not see a machine that becomes slower. Shapes are those of ``benchmarks.store.pool``: memory3, 8 of 128 tokens in
18 layers, and prefix, 128 tokens in 36. A changed byte must be found with the comparison and not without it, or there
are no figures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import record
from benchmarks.engines.pairs import order, ratio
from benchmarks.store.pool import DTYPES, HEADS, KEPT, REFERENCE, ROPE, SIZE, write_bank
from mem_triton.store.bank import Bank, BankError
from mem_triton.store.bank.compared import EVERY, SETTLED_NS, Compared
from mem_triton.store.bank.shards import Shards
from mem_triton.store.pool.placement import place
from mem_triton.store.pool.pool import PagePool


class Never(Compared):
    """Has nothing compared: what a load costs without it."""

    def is_due(self, part: Hashable) -> bool:
        return False


class Always(Compared):
    """Has every read compared."""

    def is_due(self, part: Hashable) -> bool:
        super().is_due(part)
        return True


class Staggered(Compared):
    """Compares as a server does, long after its start: one in eight of entries that are loaded one after another."""

    def add(self, part: Hashable) -> None:
        first = part not in self._reads
        super().add(part)
        if first and part in self._reads:
            self._reads[part] = len(self._reads) % EVERY


COMPARED: dict[str, type[Compared]] = {"baseline": Never, "first": Always, "later": Staggered}


class Sides:
    """Loads of one bank's entries: "baseline" compares nothing, "first" everything, "later" what a server does."""

    def __init__(self, path: Path, kind: str) -> None:
        layers, tokens = KEPT[kind]
        page_tokens = 8 if kind == "memory3" else 16
        pool = PagePool(layers, HEADS, SIZE, page_tokens, 2 * -(-tokens // page_tokens), DTYPES["auto"], "cpu")
        self.banks = {side: Bank.open(path) for side in COMPARED}
        for side, bank in self.banks.items():
            usual = bank.shards
            bank.shards = Shards(usual.folder, bank.spec, usual.codec, usual._sha256_of, COMPARED[side])
        self.loads = {side: self._load(bank, pool, [ROPE] * layers, kind) for side, bank in self.banks.items()}

    @staticmethod
    def _load(bank: Bank, pool: PagePool, ropes: list[Any], kind: str) -> Callable[[str], torch.Tensor]:
        def load(ref: str) -> torch.Tensor:
            with bank.reading(ref) as block:
                return pool.layout.pack(place(block, ropes, kind, REFERENCE)).data

        return load

    def close(self) -> None:
        for bank in self.banks.values():
            bank.close()


def timed(load: Callable[[str], Any], refs: list[str]) -> float:
    """Microseconds of one load, of several in a row."""
    begin = time.perf_counter()
    for ref in refs:
        load(ref)
    return 1e6 * (time.perf_counter() - begin) / len(refs)


def pairs(sides: Sides, side: str, refs: list[str], count: int) -> dict[str, list[float]]:
    """Microseconds a load, of a side and of the baseline; every entry has been loaded before by both."""
    loads = {"baseline": sides.loads["baseline"], "memory": sides.loads[side]}
    for ref in refs:
        if not torch.equal(loads["baseline"](ref), loads["memory"](ref)):
            raise SystemExit("WRONG: the two sides load other pages; no time is given")
    taken: dict[str, list[float]] = {"baseline": [], "memory": []}
    for pair in range(count):
        those = [refs[(EVERY * pair + i) % len(refs)] for i in range(EVERY)]
        for one in order(pair):
            taken[one].append(timed(loads[one], those))
    return taken


def check_gate(path: Path, kind: str, ref: str) -> None:
    """See that a changed byte of an entry is found by the side that compares, and by the other not."""
    with Bank.open(path) as bank:
        ((name,),) = bank.catalogue.read("SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE id = ?", ref)
        shard = bank.shards.folder / name
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    sides = Sides(path, kind)
    try:
        sides.loads["baseline"](ref)
        sides.loads["later"](ref)
    except BankError as error:
        if "has changed since it was written" not in str(error):
            raise
    else:
        raise SystemExit("WRONG: a changed byte was not found; no time is given")
    finally:
        sides.close()


def measure(kind: str, entries: int, count: int) -> list[dict[str, Any]]:
    """Rows of the result: a kind of bank, loads of entries for the first time and later."""
    refs = [str(number) for number in range(entries)]
    layers, tokens = KEPT[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank"
        write_bank(path, kind, entries).close()
        time.sleep(SETTLED_NS / 1e9)  # before, every read is a first one
        sides = Sides(path, kind)
        try:
            taken = {side: pairs(sides, side, refs, count) for side in ("first", "later")}
        finally:
            sides.close()
        check_gate(path, kind, refs[-1])
    return [
        {
            "kind": kind,
            "layers": layers,
            "tokens": tokens,
            "loads": side,
            "unchecked_us": statistics.median(found["baseline"]),
            "checked_us": statistics.median(found["memory"]),
            "ratio": asdict(ratio(found["baseline"], found["memory"])),
        }
        for side, found in taken.items()
    ]


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.store.checksums", description=__doc__, formatter_class=raw)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--entries", type=int, default=24, help="of a bank; a multiple of eight")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/checksums-<cpu|gpu>-<date>.json")
    parser.add_argument("--json", type=Path, help="write the same file here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = record.about("what a load pays for its checksums", "python -m benchmarks.store.checksums")
    rows = [row for kind in KEPT for row in measure(kind, args.entries, args.pairs)]
    for row in rows:
        found = row["ratio"]
        interval = "" if found["low"] is None else f" [{found['low'] - 1:+.1%}, {found['high'] - 1:+.1%}]"
        print(
            f"{row['kind']:>8}, {row['tokens']} tokens in {row['layers']} layers, {row['loads']}: "
            f"{row['unchecked_us']:.0f} us, with checksums {row['checked_us']:.0f} us, "
            f"{found['median'] - 1:+.1%}{interval} over {found['pairs']} pairs"
        )
    record.keep(head | {"threads": 1, "rows": rows}, "checksums", args.save, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
