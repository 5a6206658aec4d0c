"""``memory_attention`` on a CPU for rows of few queries, decoding above all: one softmax, compiled by numba.

Every row and KV head is attended alone, in fp32, reading the KV cache as its engine has packed it. So a row's bits
follow from the row alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import (
    AttentionCall,
    MemoryPages,
    PagedContext,
    SharedSegment,
)
from mem_triton.ops.memory_attention.cpu.numba_bf16 import supported
from mem_triton.ops.memory_attention.cpu.numba_rows import parallel, serial

SHORT = 16
"""Queries of a row up to which it is attended here; more are products of matrices, which torch does faster."""
KINDS = {"rows": 0, "columns": 1, "pairs": 2}
_HAS_DOT = supported()
_NO_INTS = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)


def takes(context: PagedContext, query: Tensor, pages: MemoryPages | None, shared: SharedSegment | None) -> bool:
    """Whether these tensors can be read here."""
    segments = [x.keys.dtype for x in (pages, shared) if x is not None]
    kind = "rows" if context.packing is None else context.packing.kind
    known = kind in KINDS and (kind != "pairs" or query.dtype == torch.bfloat16)
    return (
        known
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[2] % 8 == 0
        and all(dtype == query.dtype for dtype in [context.keys.dtype, *segments])
    )


def attend(call: AttentionCall, rows: np.ndarray) -> None:
    """Attend the rows ``rows``, int64, of a call that is already checked."""
    query, context, out, scale, row_slot, pages, table, shared, soft_cap, sinks, lse, _ = call
    packing = context.packing
    kind = KINDS["rows" if packing is None else packing.kind]
    strides = context.keys.stride()
    cache = (_flat(context.keys), _flat(context.values))
    words = (_words(context.keys, kind), _words(context.values, kind))
    tokens = context.keys.shape[2] if packing is None else packing.tokens
    of_context = (kind, tokens, strides[0], strides[1], query.shape[2] if packing is not None else strides[2])
    nothing = cache[0][:0]
    of_pages, of_shared, page_data, shared_data = (0, 0, 0), (0, 0, 0), (nothing, nothing), (nothing, nothing)
    entries, counts, bias, width, shared_range, worth = (_NO_INTS,) * 4, _NO_INTS, _NO_FLOATS, 0, (_NO_INTS,) * 2, 0.0
    if pages is not None:
        page_data, of_pages = (_flat(pages.keys), _flat(pages.values)), pages.keys.stride()[:3]
        entries, counts, width = tuple(map(_flat, table[:4])), table.count.numpy(), table.page.stride(0)
        bias = bias if table.bias is None else _flat(table.bias)
    if shared is not None:
        shared_data = (_flat(shared.keys), _flat(shared.values))
        of_shared = (*shared.keys.stride()[:2], shared.keys.shape[1])
        shared_range, worth = (shared.first.numpy(), shared.end.numpy()), shared.bias
    slots = np.full(len(context.seq_lens), -1, np.int32) if row_slot is None else row_slot.numpy()
    shape = (
        context.keys.shape[1],
        *query.shape[1:],
        *query.stride()[:2],
        *out.stride()[:2],
        0 if lse is None else lse.stride(0),
        context.block_table.stride(0),
        width,
    )
    run = parallel if torch.get_num_threads() > 1 and len(rows) * context.keys.shape[1] > 1 else serial
    run(
        _flat(query),
        _flat(out),
        _NO_FLOATS if lse is None else _flat(lse),
        rows,
        shape,
        _flat(context.block_table),
        context.query_start_loc.numpy(),
        context.seq_lens.numpy(),
        slots,
        cache,
        words,
        of_context,
        page_data,
        of_pages,
        entries,
        counts,
        bias,
        shared_data,
        of_shared,
        shared_range,
        np.float32(worth),
        np.float32(scale),
        np.float32(soft_cap),
        _NO_FLOATS if sinks is None else sinks.numpy(),
        query.dtype == torch.bfloat16 and query.shape[2] % 32 == 0 and _HAS_DOT,
    )


def warm_up(dtype: torch.dtype) -> None:
    """Compile what serving in ``dtype`` runs, before the first request: types, and no shapes, tell variants apart."""
    if dtype not in (torch.float32, torch.bfloat16):
        return
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int32)  # noqa: E731
    query, cache = torch.zeros(1, 1, 32, dtype=dtype), torch.zeros(1, 1, 32, 64, dtype=dtype)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    context = PagedContext(*cache.split(32, -1), zeros(1, 1), starts, lengths, 1)
    rows = np.zeros(1 if torch.get_num_threads() == 1 else 2, np.int64)
    attend(AttentionCall(query, context, query.clone(), 1.0), rows)


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _flat(tensor: Tensor) -> np.ndarray:
    """All elements from a tensor's first to its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _array(tensor.as_strided((extent if tensor.numel() else 0,), (1,)))


def _words(tensor: Tensor, kind: int) -> np.ndarray:
    return _flat(tensor).view(np.uint32) if kind == KINDS["pairs"] else np.empty(0, np.uint32)
