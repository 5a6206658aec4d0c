"""``memory_attention`` on a CPU: one softmax, compiled by numba.

Every block of queries of a row and a KV head is attended alone, in fp32, reading the KV cache as its engine has packed
it. Sums go over the same tokens in the same order in every block, so a query's bits follow from its row alone. The
compiled loops take addresses: of a layer, which stay for as long as its tensors do, and of a step, the same in all of
its layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import AttentionCall, PagedContext
from mem_triton.ops.memory_attention.cpu.numba_rows import attend_some, parallel
from mem_triton.ops.memory_attention.cpu.numba_tiles import COLUMNS, PAIRS, ROWS
from mem_triton.ops.memory_attention.cpu.numba_vectors import HAS_DOT

KINDS = {"rows": ROWS, "columns": COLUMNS, "pairs": PAIRS}
BLOCK = 64
"""Queries times the heads of a group in a block, at most; a block of one query may have more."""


_STEP = (
    "rows",
    "starts",
    "lengths",
    "slots",
    "blocks",
    "blocks_row",
    "page",
    "tokens",
    "first",
    "end",
    "counts",
    "columns",
    "bias",
    "shared_first",
    "shared_end",
)
_LAYER = (
    "heads",
    "group",
    "size",
    "wide",
    "dot",
    "kind",
    "block",
    "keys",
    "values",
    "block_step",
    "head_step",
    "token_step",
    "pages",
    "page_values",
    "page_step",
    "page_head",
    "page_token",
    "shared_keys",
    "shared_values",
    "shared_head",
    "shared_token",
    "shared_tokens",
    "sinks",
    "query_row",
    "query_head",
    "out_row",
    "out_head",
    "lse_row",
)
_STEP_TYPE = np.dtype([(name, np.int64) for name in _STEP])
_LAYER_TYPE = np.dtype(
    [(name, np.int64) for name in _LAYER] + [(name, np.float32) for name in ("shared_bias", "scale", "soft_cap")]
)


def takes(call: AttentionCall) -> bool:
    """Whether this call's tensors can be read here."""
    context, query = call.context, call.query
    kind = "rows" if context.packing is None else context.packing.kind
    read = [x.keys.dtype for x in (context, call.pages, call.shared) if x is not None]
    return (
        kind in KINDS
        and (kind == "rows" or context.packing.tokens % 32 == 0)
        and (kind != "pairs" or query.dtype == torch.bfloat16)
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[2] % 16 == 0
        and all(dtype == query.dtype for dtype in read)
    )


def attend(call: AttentionCall, counts: np.ndarray) -> None:
    """Attend the first ``counts`` queries of each row, all or none, of a call that is already checked."""
    blocks = blocks_of(counts, call.query.shape[1] // call.context.keys.shape[1])
    run(blocks, step_of(call), layer_of(call), call.query, call.out, call.lse)


def run(
    blocks: np.ndarray, step: np.ndarray, layer: np.ndarray, query: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    """Attend blocks of queries. Of the tensors nothing but the address is asked here."""
    if len(blocks) == 0:
        return
    places = (query.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr())
    threads = torch.get_num_threads()
    if threads > 1:
        parallel(threads, blocks, step, layer, *places)
    else:
        attend_some(0, 1, blocks, step, layer, *places)


def blocks_of(counts: np.ndarray, group: int) -> np.ndarray:
    """(row, first query, queries) of each block of rows with ``counts`` queries, int32 [blocks, 3].

    group: query heads of a KV head.
    """
    rows, most = np.flatnonzero(counts), max(1, BLOCK // group)
    if len(rows) == 0 or counts.max() <= most:
        found = np.zeros((len(rows), 3), np.int32)
        found[:, 0], found[:, 2] = rows, counts[rows]
        return found
    blocks = -(-counts[rows] // most)
    row = rows.repeat(blocks)
    begin = most * (np.arange(len(row)) - (np.cumsum(blocks) - blocks).repeat(blocks))
    return np.stack([row, begin, np.minimum(counts[row] - begin, most)], 1).astype(np.int32)


def layer_of(call: AttentionCall) -> np.ndarray:
    """What of a call stays in every step of its layer. It holds for as long as the call's tensors are there."""
    query, context, out, pages, shared = call.query, call.context, call.out, call.pages, call.shared
    (_, query_heads, size), wide, packing = query.shape, query.element_size(), context.packing
    at: dict[str, float] = dict.fromkeys(_LAYER, 0)
    at |= {"heads": context.keys.shape[1], "group": query_heads // context.keys.shape[1], "size": size, "wide": wide}
    at |= {"dot": wide == 2 and size % 32 == 0 and HAS_DOT, "scale": call.scale, "soft_cap": call.soft_cap}
    at |= {"kind": KINDS["rows" if packing is None else packing.kind], "shared_bias": 0.0}
    at["block"] = context.keys.shape[2] if packing is None else packing.tokens
    strides = [wide * stride for stride in context.keys.stride()]
    at["block_step"], at["head_step"] = strides[:2]
    at["token_step"] = strides[2] if packing is None else size * wide
    at["keys"], at["values"] = _places(context.keys, context.values)
    if pages is not None:
        at["pages"], at["page_values"] = _places(pages.keys, pages.values)
        at["page_step"], at["page_head"], at["page_token"] = (wide * stride for stride in pages.keys.stride()[:3])
    if shared is not None:
        at["shared_keys"], at["shared_values"] = _places(shared.keys, shared.values)
        at["shared_head"], at["shared_token"] = (wide * stride for stride in shared.keys.stride()[:2])
        at |= {"shared_tokens": shared.keys.shape[1], "shared_bias": shared.bias}
    at["sinks"] = _place(call.sinks)
    at["query_row"], at["query_head"] = query.stride()[:2]
    at["out_row"], at["out_head"] = out.stride()[:2]
    at["lse_row"] = 0 if call.lse is None else call.lse.stride(0)
    return np.array([tuple(at[name] for name in _LAYER_TYPE.names)], _LAYER_TYPE)


def step_of(call: AttentionCall) -> np.ndarray:
    """What of a call all layers of a step have in common. It holds for as long as the call's tensors are there."""
    context, table, shared = call.context, call.table, call.shared
    at = dict.fromkeys(_STEP, 0)
    at |= {"rows": len(context.seq_lens), "starts": _place(context.query_start_loc)}
    at |= {"lengths": _place(context.seq_lens), "slots": _place(call.row_slot)}
    at |= {"blocks": _place(context.block_table), "blocks_row": 4 * context.block_table.stride(0)}
    if table is not None:
        at |= {name: _place(getattr(table, name)) for name in ("page", "tokens", "first", "end", "bias")}
        at |= {"counts": _place(table.count), "columns": table.page.stride(0)}
    if shared is not None:
        at |= {"shared_first": _place(shared.first), "shared_end": _place(shared.end)}
    return np.array([tuple(at[name] for name in _STEP)], _STEP_TYPE)


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _places(keys: Tensor, values: Tensor) -> tuple[int, int]:
    """Where keys lie, and how far behind them the values do."""
    return keys.data_ptr(), values.data_ptr() - keys.data_ptr()


def warm_up(dtype: torch.dtype) -> None:
    """Compile what serving in ``dtype`` runs, before the first request."""
    if dtype not in (torch.float32, torch.bfloat16):
        return
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int32)  # noqa: E731
    query, cache = torch.zeros(1, 1, 32, dtype=dtype), torch.zeros(1, 1, 32, 64, dtype=dtype)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    context = PagedContext(*cache.split(32, -1), zeros(1, 1), starts, lengths, 1)
    attend(AttentionCall(query, context, query.clone(), 1.0), np.ones(1, np.int64))
