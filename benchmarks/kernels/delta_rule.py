"""Times ``delta_rule_paged`` beside its bandwidth floor; refuses to print a time for a wrong result.

    python benchmarks/kernels/delta_rule.py [--device cuda|cpu] [--rank 8] [--heads 1] [--repeats 200] [--json FILE]

On a GPU a run is a CUDA graph of one call per layer, each layer with its own tensors, so that the caches are as cold as
in a model; the time is per layer, median and 10 to 90 % range over repeats. On the CPU it is the plain call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mem_triton.ops.delta_rule import DeltaRuleInputs, DeltaRuleSpec, activate, delta_rule, delta_rule_paged

BANDWIDTH = {"NVIDIA H200": 4.3e12}  # bytes a second that a copy reaches; floors are printed for these GPUs only
TOLERANCE = 1e-5
BLOCK = 16  # tokens of a KV block and of a state cell
LAYERS = 36


def build(
    spec: DeltaRuleSpec, rows: int, queries: int, computed: int, device: str, dtype: torch.dtype, seed: int
) -> dict:
    """One layer's arguments for ``rows`` rows with ``queries`` new tokens behind ``computed`` old ones."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-(queries + computed) // BLOCK)
    tensors = {
        "projections": torch.randn(rows * queries, spec.projection_width, generator=g).to(dtype),
        "gate_bias": torch.full((spec.bias_width,), -1.5),
        "reads": torch.full((rows * queries, spec.read_width), float("nan")),
        "state_cache": torch.randn(rows * blocks + 1, 1, spec.state_size, generator=g),
        "block_table": (torch.randperm(rows * blocks, generator=g) + 1).view(rows, blocks).int(),
        "query_start_loc": torch.arange(rows + 1, dtype=torch.int32) * queries,
        "seq_lens": torch.full((rows,), queries + computed, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def error(spec: DeltaRuleSpec, tensors: dict, options: dict) -> float:
    """Relative RMS error of one call's reads and last states against the fp64 token loop."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    cpu = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    delta_rule_paged(**tensors, **options)
    rows, lengths = len(cpu["seq_lens"]), cpu["seq_lens"].long()
    queries = len(cpu["projections"]) // rows
    computed = int(lengths[0]) - queries
    start = torch.zeros(rows, spec.state_size, dtype=torch.float64)
    if computed:
        start = cpu["state_cache"][cpu["block_table"][:, (computed - 1) // BLOCK].long(), 0].double()
    inputs = activate(cpu["projections"].double(), cpu["gate_bias"].double(), spec)
    shape = (rows, spec.heads, spec.rank, spec.rank)
    reads, final, _ = delta_rule(DeltaRuleInputs(*inputs), start.view(shape), cpu["query_start_loc"])
    got = tensors["state_cache"].cpu()[cpu["block_table"][:, -1].long(), 0]
    pairs = ((tensors["reads"].cpu(), reads.flatten(1)), (got, final.flatten(1)))
    return max(
        float((actual - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))
        for actual, want in pairs
    )


def floor_seconds(tensors: dict, spec: DeltaRuleSpec, bandwidth: float) -> float:
    """Time to move what one call must: projections in, reads out, a state in and each new cell out per row."""
    rows = len(tensors["seq_lens"])
    queries = len(tensors["projections"]) // rows
    cells = rows * (1 + -(-queries // BLOCK))
    moved = sum(tensors[name].nbytes for name in ("projections", "reads")) + cells * spec.state_size * 4
    return moved / bandwidth


def gpu_times(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds per call, one number per replay of a graph of all calls."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()  # evicts L2
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return times


def cpu_times(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    for call in calls:
        call()
    times = []
    for i in range(repeats):
        begin = time.perf_counter()
        calls[i % len(calls)]()
        times.append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    spec = DeltaRuleSpec(rank=args.rank, heads=args.heads)
    gpu = args.device == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if gpu else f"CPU, 1 thread ({platform.processor() or platform.machine()})"
    dtype, layers = (torch.bfloat16, LAYERS) if gpu else (torch.float32, 4)
    options = {**vars(spec), "block_size": BLOCK, "tokens_per_state": BLOCK}

    print(f"delta_rule_paged, rank {spec.rank}, heads {spec.heads}, {dtype}, on {name}")
    print(f"{'case':>22} {'us/layer':>10} {'10 %':>9} {'90 %':>9} {'floor us':>9} {'error':>9}")
    rows, wrong = [], False
    cases = [(n, 1, 100) for n in (1, 8, 32, 256)] + [(1, 512, 0), (1, 8192, 0), (8, 1024, 32)]
    for batch, queries, computed in cases:
        data = [build(spec, batch, queries, computed, args.device, dtype, seed) for seed in range(layers)]
        options["max_query_len"] = queries
        bad = error(spec, data[0], options)
        label = f"{batch} x {queries} tokens"
        if not bad <= TOLERANCE:
            print(f"{label:>22} WRONG: relative RMS error {bad:.1e} > {TOLERANCE:.0e}; no time is given")
            wrong = True
            continue
        calls = [lambda t=tensors: delta_rule_paged(**t, **options) for tensors in data]
        repeats = args.repeats if queries == 1 or gpu else max(args.repeats // 10, 5)
        with torch.inference_mode():
            times = gpu_times(calls, repeats) if gpu else cpu_times(calls, repeats)
        low, *_, high = statistics.quantiles(times, n=10)
        floor = floor_seconds(data[0], spec, BANDWIDTH[name]) * 1e6 if name in BANDWIDTH else None
        median = statistics.median(times)
        shown = f"{floor:9.3f}" if floor is not None else f"{'-':>9}"
        print(f"{label:>22} {median * 1e6:10.2f} {low * 1e6:9.2f} {high * 1e6:9.2f} {shown} {bad:9.1e}")
        rows.append(
            {"batch": batch, "tokens": queries, "us": median * 1e6, "us_p10": low * 1e6, "us_p90": high * 1e6,
             "floor_us": floor, "error": bad, "device": name, "rank": spec.rank, "heads": spec.heads}
        )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
