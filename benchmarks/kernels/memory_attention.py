"""Times the routes of ``memory_attention`` beside stock attention and the roofline; no time for a wrong result.

    python -m benchmarks.kernels.memory_attention [--device cuda|cpu] [--cases NAME ...] [--repeats 100] [--json FILE]

Each case is one layer's attention of a batch: queries, paged context, memory pages and a shared segment. Timed in the
same run, on the same tensors:

    fused           (a) one kernel for everything
    shared_batched  (b) fused for the rows' own keys, then the shared segment once for all rows
    stock_context   (c) a stock backend for the context, then memory merged into its output
    context: ...    stock attention without any memory: what the model costs anyway
    as prefix: ...  stock attention that reads the shared segment as a prefix in each request's block table

Stock is vLLM's Triton kernel and its FlashAttention where they can be imported, else torch's SDPA on dense copies. On a
GPU a run is a CUDA graph of one call per layer, each layer with tensors of its own; the time is per layer. Without a
GPU small shapes run on torch's CPU path: the file then says so, and its figures say nothing about kernels. An fp8 pool
is compared with the bf16 one that the stock backends read as a prefix.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.delta_rule import cpu_times, gpu_times
from mem_triton.ops.memory_attention import (
    FOREVER,
    MemoryPages,
    MemoryTable,
    PagedContext,
    Policy,
    SharedSegment,
    add_memory,
    memory_attention,
    reference,
)

BANDWIDTH = {"NVIDIA H200": 4.3e12}  # bytes a second that a copy reaches
MATRIX = {"NVIDIA H200": 790e12}  # bf16 operations a second that a matrix product reaches
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative RMS to fp64
BLOCK, PAGE = 16, 8  # tokens of a KV block; of a page of Memory³: 8 kept of 128
PACKAGES = ("torch", "triton", "vllm", "flash-attn", "mem_triton")


class Case(NamedTuple):
    name: str
    rows: int
    queries: int
    context: int  # tokens computed before
    pages: int
    shared: int
    heads: tuple[int, int, int] = (32, 8, 128)  # query heads, KV heads, head size
    fp8: bool = False  # the shared segment's data


GPU_CASES = [
    *(Case(f"memory3-2b decode x{n}", n, 1, 4096, 5, 0, (40, 8, 80)) for n in (1, 8, 32, 256)),
    *(Case(f"qwen3-8b decode x{n}", n, 1, 4096, 5, 0) for n in (1, 32)),
    *(Case(f"pool 12800 decode x{n}", n, 1, 1024, 0, 12800) for n in (1, 16, 64, 256)),
    *(Case(f"pool 12800 fp8 decode x{n}", n, 1, 1024, 0, 12800, fp8=True) for n in (1, 16, 64)),
    *(Case(f"prefix {s} decode x{n}", n, 1, 1024, 0, s) for s in (128, 512, 2048) for n in (8, 128)),
    Case("memory3 prefill 2048", 1, 2048, 0, 5, 32),
    Case("pool 12800 prefill 2048", 1, 2048, 0, 0, 12800),
]
CPU_CASES = [
    Case("decode x4", 4, 1, 256, 5, 0, (8, 2, 64)),
    Case("pool 512 decode x16", 16, 1, 128, 0, 512, (8, 2, 64)),
]


class Layer(NamedTuple):
    query: Tensor  # [T, Hq, D]
    out: Tensor
    lse: Tensor
    cache: Tensor  # [2, blocks, BLOCK, Hkv, D], as vLLM has it; the shared segment's blocks come first
    context: PagedContext
    prefixed: Tensor  # int32 [rows, ...], block table with the shared segment before the context
    memory: dict[str, Any]


def build(case: Case, device: str, dtype: torch.dtype, seed: int) -> Layer:
    g = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device, dtype=dtype)  # noqa: E731
    integers = lambda values: torch.as_tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    hq, hkv, size = case.heads
    tokens, length = case.rows * case.queries, case.queries + case.context
    own, before = -(-length // BLOCK), case.shared // BLOCK
    cache = normal(2, before + case.rows * own, BLOCK, hkv, size)
    table = before + torch.randperm(case.rows * own, generator=g, device=device).view(case.rows, own).int()
    context = PagedContext(
        *(x.transpose(1, 2) for x in cache), table, integers(range(0, tokens + 1, case.queries)),
        integers([length] * case.rows), case.queries,
    )  # fmt: skip
    memory: dict[str, Any] = {"row_slot": torch.arange(case.rows, dtype=torch.int32, device=device)}
    always = {"first": integers([0] * case.rows), "end": integers([FOREVER] * case.rows)}
    if case.pages:
        count = case.rows * case.pages
        columns = [torch.randperm(count, generator=g, device=device).view(case.rows, case.pages).int()]
        columns += [torch.full_like(columns[0], n) for n in (PAGE, 0, FOREVER)]
        memory["pages"] = MemoryPages(normal(count, hkv, PAGE, size), normal(count, hkv, PAGE, size))
        memory["table"] = MemoryTable(*columns, integers([case.pages] * case.rows))
    if case.shared:
        keys, values = (x[:before].flatten(0, 1).transpose(0, 1) for x in cache)  # [Hkv, S, D]
        scales = {}
        if case.fp8:
            scales = {"key_scale": keys.float().abs().amax(1) / 448, "value_scale": values.float().abs().amax(2) / 448}
            keys = (keys / scales["key_scale"][:, None]).contiguous().to(torch.float8_e4m3fn)
            values = (values / scales["value_scale"][..., None]).contiguous().to(torch.float8_e4m3fn)
        memory["shared"] = SharedSegment(keys, values, **always, **scales)
    prefixed = torch.cat([torch.arange(before, dtype=torch.int32, device=device).expand(case.rows, -1), table], 1)
    query = normal(tokens, hq, size)
    lse = torch.empty(tokens, hq, device=device)
    return Layer(query, torch.empty_like(query), lse, cache, context, prefixed.contiguous(), memory)


def vllm_triton(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], None]:
    """vLLM's unified attention, with its split over the sequence where vLLM itself uses it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    hq, hkv, size = case.heads
    lengths, segments, most = layer.context.seq_lens + extra, 16, max(1, 128 // hkv)
    padded = 1 << (size - 1).bit_length()
    room = lambda *shape: torch.empty(most, hq, segments, *shape, device=layer.query.device)  # noqa: E731
    buffers = dict(
        seq_threshold_3D=most, num_par_softmax_segments=segments, softmax_segm_output=room(padded),
        softmax_segm_max=room(), softmax_segm_expsum=room(),
    )  # fmt: skip
    return lambda: unified_attention(
        q=layer.query, k=layer.cache[0], v=layer.cache[1], out=layer.out, cu_seqlens_q=layer.context.query_start_loc,
        max_seqlen_q=case.queries, seqused_k=lengths, max_seqlen_k=case.queries + case.context + extra,
        softmax_scale=size**-0.5, causal=True, window_size=(-1, -1), block_table=table, softcap=0.0,
        q_descale=None, k_descale=None, v_descale=None, **buffers,
    )  # fmt: skip


def flash_lse(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], Tensor]:
    """FlashAttention as vLLM ships it; returns its log-sum-exp, [Hq, T]."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, is_fa_version_supported

    version = 3 if is_fa_version_supported(3) else 2
    lengths = layer.context.seq_lens + extra
    return lambda: flash_attn_varlen_func(
        layer.query, layer.cache[0], layer.cache[1], case.queries, layer.context.query_start_loc,
        case.queries + case.context + extra, seqused_k=lengths, block_table=table, causal=True,
        softmax_scale=case.heads[2] ** -0.5, out=layer.out, return_softmax_lse=True, fa_version=version,
    )[1]  # fmt: skip


def sdpa(case: Case, layer: Layer, table: Tensor, extra: int) -> Callable[[], None]:
    """torch's SDPA on a dense copy of the keys, which is made outside of the timing."""
    length, shape = case.queries + case.context + extra, (case.rows, case.queries, *case.heads[::2])
    keys, values = (x[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in layer.cache)
    place = torch.arange(length, device=layer.query.device)
    mask = None if case.queries == 1 else place <= place[-case.queries :, None]

    def call() -> None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            layer.query.view(shape).transpose(1, 2), keys, values, mask, enable_gqa=True
        )
        layer.out.copy_(attended.transpose(1, 2).reshape(layer.out.shape))

    return call


def variants(case: Case, layer: Layer, gpu: bool) -> dict[str, Callable[[], Any]]:
    """Name -> a call that writes ``layer.out``. What cannot be imported is missing, with its reason printed once."""
    scale, step = case.heads[2] ** -0.5, (layer.query, layer.context.query_start_loc, layer.context.seq_lens)
    own = dict(scale=scale, lse=layer.lse)
    found: dict[str, Callable[[], Any]] = {}
    fused, batched = Policy("fused"), Policy("shared_batched")
    for policy in (fused, batched) if gpu and case.shared else (fused,):
        found[policy.route] = lambda policy=policy: memory_attention(
            layer.query, layer.context, layer.out, **own, **layer.memory, policy=policy
        )
    stock, lse_backend = {}, None
    for name, make in (("vllm triton", vllm_triton), ("flash", flash_lse)) if gpu else ():
        try:
            make(case, layer, layer.context.block_table, 0)()
        except Exception as error:  # not built for this machine, or not for these shapes
            left_out(name, f"{type(error).__name__}: {error}"[:100])
        else:
            stock[name] = make
            lse_backend = make if make is flash_lse else lse_backend
    stock = stock or {"sdpa": sdpa}
    for name, make in stock.items():
        found[f"context: {name}"] = make(case, layer, layer.context.block_table, 0)
        if case.shared and not case.pages:
            found[f"as prefix: {name}"] = make(case, layer, layer.prefixed, case.shared)
    if lse_backend:
        attend, by = lse_backend(case, layer, layer.context.block_table, 0), "flash"
    else:
        by = "own kernel" if gpu else "own cpu path"
        attend = lambda: (  # noqa: E731
            memory_attention(layer.query, layer.context, layer.out, **own, policy=fused), layer.lse.t()
        )[1]  # fmt: skip
    found[f"stock_context ({by})"] = lambda: add_memory(
        *step, case.queries, layer.out, attend().t(), scale=scale, **layer.memory
    )
    return found


@functools.cache
def left_out(name: str, reason: str) -> None:
    print(f"  {name} is left out: {reason}")


def error(case: Case, layer: Layer, name: str) -> float:
    """Relative RMS error of ``layer.out`` to fp64 on the last query of up to three rows."""
    wanted, got = [], []
    with_memory = not name.startswith("context:")
    for row in sorted({0, case.rows // 2, case.rows - 1}):
        token, length = (row + 1) * case.queries - 1, case.queries + case.context
        parts = [(*reference.read_context(layer.context, row, length, torch.float64), 0.0)]
        if with_memory:
            pick = {name: layer.memory.get(name) for name in ("pages", "table", "shared")}
            parts += reference.read_memory(row, length - 1, **pick, dtype=torch.float64)
        wanted.append(reference.attend(layer.query[token].double(), parts, case.heads[2] ** -0.5, 0.0, None)[0])
        got.append(layer.out[token].double())
    want, have = torch.stack(wanted), torch.stack(got)
    return float((have - want).square().mean().sqrt() / want.square().mean().sqrt())


def floor_seconds(case: Case, device: str, item: int, with_memory: bool, shared_reads: int) -> float | None:
    """The slower of moving what must be moved and multiplying what must be multiplied; None for unknown devices."""
    if device not in BANDWIDTH:
        return None
    hq, hkv, size = case.heads
    tokens, length = case.rows * case.queries, case.queries + case.context
    memory = (case.pages * PAGE, case.shared) if with_memory else (0, 0)
    shared_item = 1 if case.fp8 else item
    keys = case.rows * (length + memory[0]) * item + shared_reads * memory[1] * shared_item
    moved = 2 * keys * hkv * size + 2 * tokens * hq * size * item
    seen = case.context + (case.queries + 1) / 2 + sum(memory)  # causal
    return max(moved / BANDWIDTH[device], 4 * tokens * hq * size * seen / MATRIX[device])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def measure(case: Case, gpu: bool, device: str, repeats: int) -> tuple[list[dict[str, Any]], bool]:
    dtype, kind = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    layers = [build(case, kind, dtype, seed) for seed in range(4 if gpu else 2)]
    rows, wrong = [], False
    calls = [variants(case, layer, gpu) for layer in layers]
    for name in calls[0]:
        layers[0].out.fill_(torch.nan)
        calls[0][name]()
        bad = error(case, layers[0], name)
        if not bad <= (5e-2 if case.fp8 and name.startswith("as prefix") else TOLERANCE[dtype]):
            print(f"{case.name:>28} {name:>32} WRONG: relative RMS error {bad:.1e}; no time is given")
            wrong = True
            continue
        times = (gpu_times if gpu else cpu_times)([layer[name] for layer in calls], repeats)
        low, *_, high = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        once = not name.startswith("as prefix")
        floor = floor_seconds(case, device, dtype.itemsize, not name.startswith("context"), 1 if once else case.rows)
        row = {"case": case.name, "variant": name, "us": median * 1e6, "us_p10": low * 1e6, "us_p90": high * 1e6,
               "floor_us": None if floor is None else floor * 1e6, "error": bad, **case._asdict()}  # fmt: skip
        rows.append({key: value for key, value in row.items() if key != "name"})
        shown = f"{floor * 1e6:9.2f} {floor / median:6.0%}" if floor is not None else f"{'-':>9} {'-':>6}"
        print(f"{case.name:>28} {name:>32} {median * 1e6:10.2f} {low * 1e6:9.2f} {high * 1e6:9.2f} {shown} {bad:8.1e}")
    return rows, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="*", help="words that a case's name must contain one of")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if gpu else f"CPU, 1 thread ({platform.processor() or platform.machine()})"
    note = "CUDA graph, time per layer" if gpu else "CPU figure of the torch path: says nothing about GPU kernels"
    print(f"memory_attention on {name}: {note}")
    print(f"{'case':>28} {'variant':>32} {'us/layer':>10} {'10 %':>9} {'90 %':>9} {'floor us':>9} {'':>6} {'error':>8}")
    rows, wrong = [], False
    with torch.inference_mode():
        for case in GPU_CASES if gpu else CPU_CASES:
            if not args.cases or any(word in case.name for word in args.cases):
                found, bad = measure(case, gpu, name, args.repeats)
                rows, wrong = rows + found, wrong or bad
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result = {"machine": name, "is_gpu": gpu, "note": note, "date": date, "versions": versions(),
                  "command": f"python -m benchmarks.kernels.memory_attention {' '.join(sys.argv[1:])}".rstrip(),
                  "correct": not wrong, "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
