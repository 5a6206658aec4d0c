"""Times the fetch of 5 references into the pool by the tier they come from, beside a plain copy of the same bytes.

    python -m benchmarks.store.pool [--device cuda|cpu] [--kind memory3|prefix] [--pool-dtype auto|int8|fp8]
                                    [--references 5] [--repeats 100] [--save] [--json FILE]

A fetch is the way that a server's references take, in one process: ``Residency`` claims their pages, ``PageLoader``
fills them, and ``before_step`` orders the next step behind the copies. What a server
adds is a call to its workers and back. The bank is written for it. Shapes are those of a 4B model: 8 KV heads of 128;
memory3: 18 layers, 8 of 128 tokens a head; prefix: 36 layers, 128 tokens. Every group of references that is fetched
from host or disk has been pushed off the tiers above by others. "disk" reads with a warm page cache: it times the
bank, RoPE and packing, not the drive. The copy is one contiguous piece of the same size, from page-locked memory on a
GPU, each time another: the floor for "host". Pages that do not hold what they should get no time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.common import record
from mem_triton.ops.reposition import rope_from_config
from mem_triton.store.bank import Bank, BankSpec, NewEntry
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.placement import place
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.residency import Residency

HEADS, SIZE, MODEL_LAYERS, REFERENCE = 8, 128, 36, 128
KEPT = {"memory3": (18, 8), "prefix": (36, 128)}  # layers, tokens per head
GROUPS = 5
DTYPES = {"auto": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ROPE = rope_from_config({"model_type": "qwen3", "head_dim": SIZE, "rope_theta": 1_000_000.0})


def write_bank(folder: Path, kind: str, entries: int) -> Bank:
    """A bank of random entries "0", "1", ... in bf16."""
    layers, tokens = KEPT[kind]
    model = Fingerprint(
        architecture="Qwen3ForCausalLM",
        num_layers=MODEL_LAYERS,
        hidden_size=2560,
        query_heads=32,
        kv_heads=HEADS,
        head_dim=SIZE,
        rope={},
        dtype="bfloat16",
        weights="benchmark",
    )
    spec = BankSpec(
        kind=kind,
        fingerprint=model,
        layers=tuple(range(layers)),
        kv_heads=HEADS,
        head_dim=SIZE,
        reference_tokens=REFERENCE,
        keep_tokens=tokens if kind == "memory3" else None,
    )
    bank = Bank.create(folder, spec)
    for number in range(entries):
        g = torch.Generator().manual_seed(number)
        keys, values = torch.randn(2, layers, HEADS, tokens, SIZE, generator=g).bfloat16()
        chosen = torch.rand(layers, HEADS, REFERENCE, generator=g).argsort(-1)[..., :tokens].sort(-1).values
        bank.add([NewEntry(str(number), f"reference {number}", MemoryBlock(keys, values, chosen.int()))])
    return bank


class Bench:
    """One pool and what fills it. groups: references that are fetched together."""

    def __init__(
        self, bank: Bank, kind: str, pool_dtype: str, device: str, host: bool, groups: list[list[str]]
    ) -> None:
        layers, tokens = KEPT[kind]
        page_tokens = 8 if kind == "memory3" else 16
        pages = 2 * len(groups[0]) * -(-tokens // page_tokens)  # two groups: each pushes another off
        self.pool = PagePool(layers, HEADS, SIZE, page_tokens, pages, DTYPES[pool_dtype], device)
        ropes, self.bank, self.kind, self.groups = [ROPE] * layers, bank, kind, groups
        self.place = lambda block: place(block, ropes, kind, REFERENCE)
        self.sizes = {ref: tokens for group in groups for ref in group}
        host_bytes = GROUPS * pages * self.pool.layout.page_bytes if host else 0
        self.loader = PageLoader(self.pool, self._read, host_bytes, max(2, len(os.sched_getaffinity(0)) // 2))
        self.residency = Residency(pages, page_tokens, self.pool.layout.page_bytes)
        self.bytes = sum(self.pool.layout.pages_for(self.sizes[ref]) for ref in groups[0]) * self.pool.layout.page_bytes

    @contextmanager
    def _read(self, ref: str) -> Iterator[MemoryBlock]:
        with self.bank.reading(ref) as block:
            yield self.place(block)

    def fetch(self, refs: Sequence[str]) -> float:
        """Seconds until the pages may be read."""
        begin = time.perf_counter()
        ticket = self.residency.request("benchmark", {ref: self.sizes[ref] for ref in refs})
        under_way = {load.ref: self.loader.load(load) for load in self.residency.take_loads()}
        for ref, over in under_way.items():
            if error := over.result():
                raise RuntimeError(error)
            self.residency.loaded(ref)
        if ticket.state != "ready":
            raise RuntimeError(ticket.state)
        self.loader.before_step()
        taken = time.perf_counter() - begin
        self.pages = ticket.pages
        return taken

    def is_right(self, refs: Sequence[str]) -> bool:
        """Whether the pages hold the references."""
        packed = {ref: self.pool.layout.pack(self.place(self.bank.load(ref))) for ref in refs}
        return all(torch.equal(self.pool.read(self.pages[ref]).data, records.data) for ref, records in packed.items())

    def times(self, repeats: int, resident: bool) -> list[float]:
        """Seconds a fetch: of the one group that stays resident, or of the groups in turn."""
        groups = self.groups[:1] if resident else self.groups
        for group in groups:  # host: now it has them all
            self.fetch(group)
            if not self.is_right(group):
                raise SystemExit("WRONG: the pages do not hold the references; no time is given")
            self.residency.release("benchmark")
        times = []
        for i in range(repeats):
            times.append(self.fetch(groups[i % len(groups)]))
            self.residency.release("benchmark")
        return times


def copy_times(size: int, device: str, repeats: int) -> list[float]:
    """Seconds of one copy of ``size`` bytes to the device, each from and to another place, as cold as the fetches."""
    gpu = device == "cuda"
    count = max(2, (64 << 20) // size)
    sources = torch.ones(count, size, dtype=torch.uint8, pin_memory=gpu)
    targets = torch.zeros(count, size, dtype=torch.uint8, device=device)
    times = []
    for i in range(repeats + 2):
        begin = time.perf_counter()
        targets[i % count].copy_(sources[i % count], non_blocking=True)
        if gpu:
            torch.cuda.current_stream().synchronize()
        times.append(time.perf_counter() - begin)
    return times[2:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", choices=list(KEPT), default="memory3")
    parser.add_argument("--pool-dtype", choices=list(DTYPES), default="auto")
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pool-<cpu|gpu>-<date>.json")
    parser.add_argument("--json", type=Path, help="write the same file here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = record.about("references into the pool, by the tier they come from", "python -m benchmarks.store.pool")
    where = head["machine"]["gpu"] if args.device == "cuda" else f"a CPU, no GPU: {head['machine']['cpu']}"
    refs = [f"{number}@1" for number in range(GROUPS * args.references)]
    groups = [refs[i::GROUPS] for i in range(GROUPS)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, write_bank(Path(folder) / "bank", args.kind, len(refs)) as bank:
        make: Callable[[bool], Bench] = lambda host: Bench(  # noqa: E731
            bank, args.kind, args.pool_dtype, args.device, host, groups
        )
        bench = make(True)
        size = bench.bytes
        floor = statistics.median(copy_times(size, args.device, args.repeats))
        measured = {
            "device": bench.times(args.repeats, resident=True),
            "host": bench.times(args.repeats, resident=False),
        }
        bench.loader.close()
        bench = make(False)
        measured["disk"] = bench.times(max(args.repeats // 5, 5), resident=False)
        bench.loader.close()
    print(f"{args.references} references ({args.kind}, pool {args.pool_dtype}), {size / 1e6:.2f} MB, on {where}")
    print(f"one copy of {size / 1e6:.2f} MB: {floor * 1e6:.0f} us, {size / floor / 1e9:.2f} GB/s")
    print(f"{'tier':>8} {'us':>10} {'10 %':>10} {'90 %':>10} {'GB/s':>8} {'of the copy':>12}")
    for tier, times in measured.items():
        low, *_, high = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        moved = tier != "device"
        speed, ratio = (size / median / 1e9, floor / median) if moved else (None, None)
        shown = f"{speed:8.2f} {ratio:11.0%}" if moved else f"{'-':>8} {'-':>11}"
        print(f"{tier:>8} {median * 1e6:10.1f} {low * 1e6:10.1f} {high * 1e6:10.1f} {shown}")
        rows.append(
            {
                "tier": tier,
                "us": median * 1e6,
                "us_p10": low * 1e6,
                "us_p90": high * 1e6,
                "bytes": size,
                "gb_per_s": speed,
                "of_copy": ratio,
                "copy_us": floor * 1e6,
                "kind": args.kind,
                "pool_dtype": args.pool_dtype,
                "references": args.references,
                "repeats": len(times),
                "device": args.device,
            }
        )
    record.keep(head | {"rows": rows}, "pool", args.save, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
