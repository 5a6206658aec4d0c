"""The tensors of a case of ``memory_attention``, what has to move for it, and its gate against fp64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Random
from mem_triton.ops.memory_attention import FOREVER, MemoryPages, MemoryTable, PagedContext, SharedSegment, reference

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # relative RMS to fp64
BLOCK, PAGE = 16, 8  # tokens of a KV block; of a page of Memory³: 8 kept of 128


class Layer(NamedTuple):
    query: Tensor  # [T, Hq, D]
    out: Tensor
    lse: Tensor
    cache: Tensor  # [2, blocks, BLOCK, Hkv, D], as vLLM has it; the shared segment's blocks come first
    context: PagedContext
    prefixed: Tensor  # int32 [rows, ...], block table with the shared segment before the context
    memory: dict[str, Any]


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
