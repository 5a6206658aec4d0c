"""``memory_attention``: one layer's attention of a batch to its context, memory pages and a shared segment.

Ours are the three routes of the op, see ``mem_triton/ops/memory_attention/policy.py``. On the pool's cases ``fused``
reads the pool once per request and ``shared_batched`` once per batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import memory_attention_baselines as baselines
from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random, by_attention
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
from mem_triton.ops.memory_attention.policy import choose
from mem_triton.ops.tuning.architecture import architecture

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # relative RMS to fp64
BLOCK, PAGE = 16, 8  # tokens of a KV block; of a page of Memory³: 8 kept of 128
REFERENCES, POOL = 5, 12800
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Layer(NamedTuple):
    query: Tensor  # [T, Hq, D]
    out: Tensor
    lse: Tensor
    cache: Tensor  # [2, blocks, BLOCK, Hkv, D], as vLLM has it; the shared segment's blocks come first
    context: PagedContext
    prefixed: Tensor  # int32 [rows, ...], block table with the shared segment before the context
    memory: dict[str, Any]


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    """A CPU gets a sixteenth of the tokens, and a sixteenth of the largest batch."""
    scale, groups, found = (1 if gpu else 16), by_attention(models), []
    batches = BATCHES if gpu else BATCHES[:5]

    def add(name: str, batch: int, queries: int, context: int, pages: int, shared: int, series="", fp8=0) -> None:
        for model, names in groups:
            sizes = {
                "batch": batch, "queries": queries, "context": context, "references": pages, "shared": shared,
                "fp8_pool": fp8, "query_heads": model.query_heads, "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
            }  # fmt: skip
            found.append(Case("memory_attention", names, name, dtype, sizes, model.layers, series))

    context, pool = 4096 // scale, POOL // scale
    for n in batches:
        add(f"decode x{n}", n, 1, context, REFERENCES, 0, "decode_batch")
    for n in batches:
        add(f"pool {pool} decode x{n}", n, 1, context // 4, 0, pool, "pool_batch")
    add(f"memory3 prefill {context // 2}", 1, context // 2, 0, REFERENCES, 32)
    add(f"pool {pool} prefill {context // 2}", 1, context // 2, 0, 0, pool)
    for n in batches[::2]:
        add(f"pool {pool} fp8 decode x{n}", n, 1, context // 4, 0, pool, fp8=1)
    for n in (1, 8):
        add(f"long decode x{n}", n, 1, 8 * context, REFERENCES, 0)
    for tokens in (2048, 512, 128):  # where batching the shared segment begins to pay
        for n in batches[3::4]:
            add(f"prefix {max(BLOCK, tokens // scale)} decode x{n}", n, 1, context // 4, 0, max(BLOCK, tokens // scale))
    return found


def build(case: Case, device: str, seed: int) -> Layer:
    g, s, dtype = Random(device, seed), case.sizes, case.torch_dtype
    rows, queries, heads, size = s["batch"], s["queries"], s["kv_heads"], s["head_dim"]
    integers = functools.partial(torch.full, dtype=torch.int32, device=device)
    tokens, length = rows * queries, queries + s["context"]
    own, before = -(-length // BLOCK), s["shared"] // BLOCK
    cache = g.normal(2, before + rows * own, BLOCK, heads, size, dtype=dtype)
    table = before + g.permutation(rows * own).view(rows, own)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * queries
    context = PagedContext(*(x.transpose(1, 2) for x in cache), table, starts, integers((rows,), length), queries)
    memory: dict[str, Any] = {"row_slot": torch.arange(rows, dtype=torch.int32, device=device)}
    if s["references"]:
        shape = (rows, s["references"])
        columns = [g.permutation(rows * s["references"]).view(shape)]
        columns += [integers(shape, n) for n in (PAGE, 0, FOREVER)]
        pages = (g.normal(rows * s["references"], heads, PAGE, size, dtype=dtype) for _ in range(2))
        memory["pages"], memory["table"] = MemoryPages(*pages), MemoryTable(*columns, integers((rows,), shape[1]))
    if s["shared"]:
        keys, values = (x[:before].flatten(0, 1).transpose(0, 1) for x in cache)  # [Hkv, S, D]
        memory["shared"] = shared_segment(keys, values, rows, bool(s["fp8_pool"]))
    prefix = torch.arange(before, dtype=torch.int32, device=device).expand(rows, -1)
    query = g.normal(tokens, s["query_heads"], size, dtype=dtype)
    lse = torch.empty(tokens, s["query_heads"], device=device)
    return Layer(query, torch.empty_like(query), lse, cache, context, torch.cat([prefix, table], 1), memory)


def shared_segment(keys: Tensor, values: Tensor, rows: int, fp8: bool) -> SharedSegment:
    """Of keys and values [Hkv, S, D], seen by all rows from the start."""
    first, end = (torch.full((rows,), n, dtype=torch.int32, device=keys.device) for n in (0, FOREVER))
    if not fp8:
        return SharedSegment(keys, values, first, end)
    key_scale, value_scale = keys.float().abs().amax(1) / 448, values.float().abs().amax(2) / 448
    keys = (keys / key_scale[:, None]).contiguous().to(torch.float8_e4m3fn)
    values = (values / value_scale[..., None]).contiguous().to(torch.float8_e4m3fn)
    return SharedSegment(keys, values, first, end, key_scale, value_scale)


def work(case: Case, memory: bool = True, shared_reads: int = 1, fp8: bool = True) -> Work:
    """Keys and values of context and memory, once per row, and ``shared_reads`` times the shared segment; queries in,
    outputs out. memory: it is read at all. fp8: the shared segment is, where the case says so."""
    s, item = case.sizes, case.torch_dtype.itemsize
    rows, queries, length = s["batch"], s["queries"], s["queries"] + s["context"]
    own, shared = (s["references"] * PAGE, s["shared"]) if memory else (0, 0)
    shared_item = 1 if s["fp8_pool"] and fp8 else item
    keys = rows * (length + own) * item + shared_reads * shared * shared_item
    moved = 2 * s["kv_heads"] * s["head_dim"] * keys + 2 * rows * queries * s["query_heads"] * s["head_dim"] * item
    seen = queries * (s["context"] + own + shared) + queries * (queries + 1) // 2  # causal
    return Work(moved, 4 * rows * s["query_heads"] * s["head_dim"] * seen)


def gate(case: Case, layer: Layer, memory: bool = True, fp8: bool = True) -> Gate:
    """``layer.out``, or the tensor that a call returned, against fp64: first, middle and last query of three rows."""
    s, scale = case.sizes, case.sizes["head_dim"] ** -0.5
    rows, queries = s["batch"], s["queries"]
    pick = {name: layer.memory.get(name) for name in ("pages", "table", "shared")}
    places = [
        (row, query) for row in sorted({0, rows // 2, rows - 1}) for query in sorted({0, queries // 2, queries - 1})
    ]

    @functools.cache
    def wanted() -> Tensor:
        if s["fp8_pool"] and not fp8:  # what stands in the KV cache
            keys, values = (x[: s["shared"] // BLOCK].flatten(0, 1).transpose(0, 1) for x in layer.cache)
            pick["shared"] = shared_segment(keys, values, rows, False)
        found = []
        for row, query in places:
            position = s["context"] + query
            parts = [(*reference.read_context(layer.context, row, position + 1, torch.float64), 0.0)]
            if memory:
                parts += reference.read_memory(row, position, **pick, dtype=torch.float64)
            found.append(reference.attend(layer.query[row * queries + query].double(), parts, scale, 0.0, None)[0])
        return torch.stack(found)

    def error(got: Any) -> float:
        out = got if isinstance(got, Tensor) else layer.out
        return relative_rms((torch.stack([out[row * queries + query] for row, query in places]), wanted()))

    return Gate(error, TOLERANCE[case.dtype])


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    """The routes, then the baselines. The shared segment of ``shared_batched`` is read once, by others per row."""
    s, scale = case.sizes, case.sizes["head_dim"] ** -0.5
    judge, own = gate(case, layer), {"scale": scale, "lse": layer.lse, **layer.memory}
    routes = ("fused", "shared_batched") if setup.gpu and s["shared"] else ("fused",)
    chosen = policy_route(case) if setup.gpu else "fused"
    attend_by = functools.partial(memory_attention, layer.query, layer.context, layer.out, **own)
    calls: dict[str, Callable[[], Any]] = {
        **{route: functools.partial(attend_by, policy=Policy(route)) for route in routes},
        "fused, batch-invariant": functools.partial(attend_by, policy=Policy("fused", batch_invariant=True)),
    }
    stock = baselines.stock(case, layer, setup)
    attend, by = baselines.with_lse(case, layer, setup, stock)
    calls[f"stock_context ({by})"] = lambda: add_memory(
        layer.query, *layer.context[3:5], s["queries"], layer.out, attend().t(), scale=scale, **layer.memory
    )
    note = {chosen: "the policy's choice"}
    found = [
        Variant(name, call, judge, work(case), writes=(layer.out, layer.lse), note=note.get(name, ""))
        for name, call in calls.items()
    ]
    return found + baselines.variants(case, layer, setup, stock)


def policy_route(case: Case) -> str:
    s = case.sizes
    return choose(
        architecture(torch.device("cuda")), rows=s["batch"], max_query_len=s["queries"], shared_tokens=s["shared"],
        head_dim=s["head_dim"],
    ).route  # fmt: skip


OPERATION = Operation("memory_attention", cases, build, variants)
