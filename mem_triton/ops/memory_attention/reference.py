"""Memory attention in plain torch: the specification.

Everything else in this folder (the torch path that serves on a CPU, the Triton kernels) is compared with this file. It
runs in any float dtype, fp64 included, and takes the queries one by one, so it is slow on purpose.

A query at position p of a row with slot s attends, in one softmax, to

* the shared segment, if ``shared.first[s] <= p < shared.end[s]``;
* the first ``tokens[s, m]`` tokens of ``page[s, m]``, for each m < ``count[s]`` with ``first[s, m] <= p < end[s, m]``
  (Memory³, arXiv 2407.01178, section 3: retrieved keys stand beside those of the context);
* the keys 0..p of its own paged context.

Slot -1 leaves the context alone. The logit of a key is cap(scale * q.k) + bias; cap(x) = soft_cap * tanh(x / soft_cap).

Example::

    out, lse = reference.memory_attention(AttentionCall(query, context, None, 64**-0.5, slots, pages, table))
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import (
    AttentionCall,
    MemoryPages,
    MemoryTable,
    PagedContext,
    SharedSegment,
)


def memory_attention(call: AttentionCall, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] (natural log) in ``dtype``; NaN where a token belongs to no row.

    ``call.out`` and ``call.lse`` are not looked at.
    """
    query, context = call.query, call.context
    out = torch.full(query.shape, float("nan"), dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:2], float("nan"), dtype=dtype, device=query.device)
    starts, lengths = context.query_start_loc.tolist(), context.seq_lens.tolist()
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        keys, values = read_context(context, row, length, dtype)
        slot = -1 if call.row_slot is None else int(call.row_slot[row])
        for token in range(begin, end):
            position = length - (end - begin) + token - begin
            parts = [(keys[:, : position + 1], values[:, : position + 1], 0.0)]
            if slot >= 0:
                parts += read_memory(slot, position, call.pages, call.table, call.shared, dtype)
            out[token], lse[token] = attend(query[token].to(dtype), parts, call.scale, call.soft_cap, call.sinks)
    return out, lse


def attend(
    query: Tensor, parts: list[tuple[Tensor, Tensor, float]], scale: float, soft_cap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One query, [Hq, D], and (keys [Hkv, n, D], values [Hkv, n, D], bias) of every segment: output and LSE [Hq]."""
    heads = query.shape[0]
    logits, values = [], []
    for keys, segment_values, bias in parts:
        group = heads // keys.shape[0]  # query heads that share a KV head are neighbours
        x = torch.einsum("hd,hnd->hn", query, keys.repeat_interleave(group, 0)) * scale
        logits.append((soft_cap * torch.tanh(x / soft_cap) if soft_cap > 0 else x) + bias)
        values.append(segment_values.repeat_interleave(group, 0))
    weights, values = torch.cat(logits, 1), torch.cat(values, 1)
    if sinks is not None:  # one more key per head, worth nothing
        weights = torch.cat([weights, sinks.to(query)[:, None]], 1)
        values = torch.cat([values, values.new_zeros(heads, 1, values.shape[2])], 1)
    lse = torch.logsumexp(weights, 1)
    share = torch.exp(weights - torch.where(lse.isinf(), 0, lse)[:, None])
    return torch.einsum("hn,hnd->hd", share, values), lse


def read_context(context: PagedContext, row: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of a row's first ``length`` tokens, [Hkv, length, D]."""
    size = context.keys.shape[2]
    blocks = context.block_table[row, : -(-length // size)].long()
    return tuple(
        cache[blocks].to(dtype).transpose(0, 1).flatten(1, 2)[:, :length] for cache in (context.keys, context.values)
    )


def read_memory(
    slot: int,
    position: int,
    pages: MemoryPages | None,
    table: MemoryTable | None,
    shared: SharedSegment | None,
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor, float]]:
    """(keys [Hkv, n, D], values [Hkv, n, D], bias) of each segment that a query at ``position`` of this slot sees."""
    parts = []
    if shared is not None and shared.first[slot] <= position < shared.end[slot]:
        keys = dequantise(shared.keys, shared.key_scale, dtype, axis=-2)
        parts.append((keys, dequantise(shared.values, shared.value_scale, dtype, axis=-1), shared.bias))
    if pages is not None:
        for m in range(int(table.count[slot])):
            if table.first[slot, m] <= position < table.end[slot, m]:
                page, tokens = int(table.page[slot, m]), int(table.tokens[slot, m])
                key_scale, value_scale = (None if x is None else x[page] for x in (pages.key_scale, pages.value_scale))
                keys = dequantise(pages.keys[page], key_scale, dtype, axis=-2)
                values = dequantise(pages.values[page], value_scale, dtype, axis=-1)
                bias = 0.0 if table.bias is None else float(table.bias[slot, m])
                parts.append((keys[:, :tokens], values[:, :tokens], bias))
    return parts


def dequantise(data: Tensor, scale: Tensor | None, dtype: torch.dtype, axis: int) -> Tensor:
    """``data * scale`` in ``dtype``; the scale lacks dimension ``axis``: tokens of keys, channels of values."""
    return data.to(dtype) if scale is None else data.to(dtype) * scale.to(dtype).unsqueeze(axis)
