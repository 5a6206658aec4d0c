"""Times a reference's load with and without the comparison with its checksums, in pairs, one thread.

    python -m benchmarks.store.checksums [--pairs 400] [--entries 24] [--save] [--json FILE]

A load reads one entry from the bank, with a warm page cache, rotates it to its place and packs it into pages. A pair is
two entries of one size, one with and one without the comparison, in turns first; the ratio does not see a machine that
becomes slower. Shapes are those of ``benchmarks.store.pool``: memory3, 8 of 128 tokens in 18 layers, and prefix, 128
tokens in 36. A changed byte must be found with the comparison and not without it, or there are no figures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import record
from benchmarks.engines.pairs import order, ratio
from benchmarks.store.pool import DTYPES, HEADS, KEPT, REFERENCE, ROPE, SIZE, write_bank
from mem_triton.store.bank import Bank, BankError
from mem_triton.store.bank.shards import OpenShard, Shards
from mem_triton.store.pool.placement import place
from mem_triton.store.pool.pool import PagePool


class Unchecked(Shards):
    """Shards that compare nothing: what a load costs without it."""

    def _file(self, name: str) -> OpenShard:
        return super()._file(name)._replace(checksums=None)


class Loads:
    """Loads of one bank's entries. sides: "baseline" compares nothing, "memory" what every server does."""

    def __init__(self, path: Path, kind: str) -> None:
        layers, tokens = KEPT[kind]
        page_tokens = 8 if kind == "memory3" else 16
        pool = PagePool(layers, HEADS, SIZE, page_tokens, 2 * -(-tokens // page_tokens), DTYPES["auto"], "cpu")
        self.banks = {side: Bank.open(path) for side in ("baseline", "memory")}
        plain = self.banks["baseline"]
        plain.shards = Unchecked(plain.shards.folder, plain.spec, plain.shards.codec, plain.shards._sha256_of)
        self.sides = {side: self._load(bank, pool, [ROPE] * layers, kind) for side, bank in self.banks.items()}

    @staticmethod
    def _load(bank: Bank, pool: PagePool, ropes: list[Any], kind: str) -> Callable[[str], Any]:
        return lambda ref: pool.layout.pack(place(bank.load(ref), ropes, kind, REFERENCE)).data

    def close(self) -> None:
        for bank in self.banks.values():
            bank.close()


def timed(load: Callable[[str], Any], ref: str) -> float:
    """Microseconds of one load."""
    begin = time.perf_counter()
    load(ref)
    return 1e6 * (time.perf_counter() - begin)


def pairs(loads: Loads, refs: list[str], count: int) -> dict[str, list[float]]:
    """Microseconds a load, of each side; every entry has been loaded before by both."""
    for ref in refs:
        checked, plain = (loads.sides[side](ref) for side in ("memory", "baseline"))
        if not torch.equal(checked, plain):
            raise SystemExit("WRONG: the two sides load other pages; no time is given")
    taken: dict[str, list[float]] = {side: [] for side in loads.sides}
    for pair in range(count):
        for i, side in enumerate(order(pair)):
            taken[side].append(timed(loads.sides[side], refs[(2 * pair + i) % len(refs)]))
    return taken


def check_gate(path: Path, kind: str, ref: str) -> None:
    """See that a changed byte of an entry is found by the side that compares, and by the other not."""
    with Bank.open(path) as bank:
        ((name,),) = bank.catalogue.read("SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE id = ?", ref)
        shard = bank.shards.folder / name
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    loads = Loads(path, kind)
    try:
        loads.sides["baseline"](ref)
        loads.sides["memory"](ref)
    except BankError as error:
        if "has changed since it was written" not in str(error):
            raise
    else:
        raise SystemExit("WRONG: a changed byte was not found; no time is given")
    finally:
        loads.close()


def measure(kind: str, entries: int, count: int) -> dict[str, Any]:
    """One row of the result: a kind of bank."""
    refs = [str(number) for number in range(entries)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank"
        write_bank(path, kind, entries).close()
        loads = Loads(path, kind)
        try:
            taken = pairs(loads, refs, count)
        finally:
            loads.close()
        check_gate(path, kind, refs[-1])
    found = ratio(taken["baseline"], taken["memory"])
    layers, tokens = KEPT[kind]
    return {
        "kind": kind,
        "layers": layers,
        "tokens": tokens,
        "unchecked_us": statistics.median(taken["baseline"]),
        "checked_us": statistics.median(taken["memory"]),
        "ratio": asdict(found),
    }


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.store.checksums", description=__doc__, formatter_class=raw)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--entries", type=int, default=24, help="of a bank; an even number")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/checksums-<cpu|gpu>-<date>.json")
    parser.add_argument("--json", type=Path, help="write the same file here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = record.about("what a load pays for its checksums", "python -m benchmarks.store.checksums")
    rows = [measure(kind, args.entries, args.pairs) for kind in KEPT]
    for row in rows:
        found = row["ratio"]
        interval = "" if found["low"] is None else f" [{found['low'] - 1:+.1%}, {found['high'] - 1:+.1%}]"
        print(
            f"{row['kind']:>8}, {row['tokens']} tokens in {row['layers']} layers: {row['unchecked_us']:.0f} us, with "
            f"checksums {row['checked_us']:.0f} us, {found['median'] - 1:+.1%}{interval} over {found['pairs']} pairs"
        )
    record.keep(head | {"threads": 1, "rows": rows}, "checksums", args.save, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
