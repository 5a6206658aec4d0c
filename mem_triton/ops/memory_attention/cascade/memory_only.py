"""Attention over memory alone, with its log-sum-exp, so that any backend that returns one can do the context.

The engine's own attention (FlashAttention 3, say) writes output and log-sum-exp of the context; ``add_memory`` merges
the memories into them, in place. Or ``memory_only_attention`` returns the memories' own, for ``merge_states``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.checks import check
from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, PagedContext, SharedSegment
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.cpu import paged_torch


def memory_only_attention(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    *,
    scale: float,
    row_slot: Tensor,
    pages: MemoryPages | None = None,
    table: MemoryTable | None = None,
    shared: SharedSegment | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend each query to its row's memory pages and the shared segment; the context is left to another kernel.

    query: [T, Hq, D] fp32, bf16 or fp16; T may exceed the batch's tokens. query_start_loc: int32 [rows + 1]; seq_lens:
    int32 [rows], length after this step; max_query_len: at least the longest row's queries, on the host. The other
    arguments are those of ``memory_attention``; sinks belong to the context's softmax.
    Returns out [T, Hq, D] in the query's dtype and lse fp32 [T, Hq], natural logarithm; 0 and -inf for every token that
    sees no memory, padding included, so that a merge leaves it as it is.

    No host sync and no data-dependent shape on a GPU. ValueError names the tensor that does not fit. Example::

        memory_out, memory_lse = memory_only_attention(query, starts, lengths, 1, scale=64**-0.5, row_slot=slots,
                                                       pages=pages, table=table)
        merge_states(context_out, context_lse, memory_out, memory_lse, context_out)
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    options = {"scale": scale, "row_slot": row_slot, "soft_cap": soft_cap}
    _check(query, query_start_loc, seq_lens, max_query_len, out, lse, pages, table, shared, **options)
    if query.device.type == "cpu":
        value, log_sum = _attend_in_torch(query, query_start_loc, seq_lens, pages, table, shared, **options)
        return out.copy_(value), log_sum
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch  # Triton is there on Linux only

    step = (query, query_start_loc, seq_lens)
    if pages is not None:
        cascade_launch.attend_pages(*step, max_query_len, out, lse, pages=pages, table=table, **options)
    else:
        out.zero_()
        lse.fill_(-torch.inf)
    if shared is not None:
        cascade_launch.attend_shared(*step, out, lse, shared=shared, **options)
    return out, lse


def add_memory(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    row_slot: Tensor,
    pages: MemoryPages | None = None,
    table: MemoryTable | None = None,
    shared: SharedSegment | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Merge memory into another backend's attention over the context, in place.

    Arguments as in ``memory_only_attention``. out: [T, Hq, D] in the query's dtype, the backend's output; lse: fp32
    [T, Hq] with any strides (FlashAttention's [Hq, T] is ``lse.t()``), its log-sum-exp, sinks included. Both become
    those of memory and context; tokens that see no memory keep their bits. One launch for the pages, one for the shared
    segment; none of them needs another tensor. Example::

        out, lse = flash_attention(..., return_softmax_lse=True)
        add_memory(query, starts, lengths, 512, out, lse.t(), scale=64**-0.5, row_slot=slots, pages=pages, table=table)
    """
    options = {"scale": scale, "row_slot": row_slot, "soft_cap": soft_cap}
    _check(query, query_start_loc, seq_lens, max_query_len, out, lse, pages, table, shared, **options)
    step = (query, query_start_loc, seq_lens)
    if query.device.type == "cpu":
        value, log_sum = _attend_in_torch(*step, pages, table, shared, **options)
        pick = (log_sum > -torch.inf).any(1)  # heads of a token see the same keys
        merged, total = out[pick], lse[pick]
        merge_states(merged, total, value[pick], log_sum[pick], merged, total)
        out[pick], lse[pick] = merged, total
        return
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch  # Triton is there on Linux only

    if pages is not None:
        cascade_launch.attend_pages(*step, max_query_len, out, lse, pages=pages, table=table, merge=True, **options)
    if shared is not None:
        cascade_launch.attend_shared(*step, out, lse, shared=shared, **options)


def _check(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    lse: Tensor,
    pages: MemoryPages | None,
    table: MemoryTable | None,
    shared: SharedSegment | None,
    *,
    scale: float,
    row_slot: Tensor,
    soft_cap: float,
) -> None:
    """The checks of ``memory_attention``, with an empty KV cache."""
    if pages is None and shared is None:
        raise ValueError("pages: neither they nor a shared segment were given; there is no memory to attend to")
    if lse.shape != query.shape[:2] or lse.dtype != torch.float32 or lse.device != query.device:
        raise ValueError(f"lse: {lse.dtype} {tuple(lse.shape)} on {lse.device}, expected float32 [T, Hq] beside query")
    heads = (shared if pages is None else pages).keys.shape[-3]
    empty = query.new_empty(0, heads, 1, query.shape[-1])
    blocks = seq_lens.new_empty(seq_lens.shape[0], 0)
    context = PagedContext(empty, empty, blocks, query_start_loc, seq_lens, max_query_len)
    check(
        query,
        context,
        out,
        scale=scale,
        row_slot=row_slot,
        pages=pages,
        table=table,
        shared=shared,
        soft_cap=soft_cap,
        sinks=None,
        lse=None,
    )


NOTHING = torch.finfo(torch.float32).min  # the log-sum-exp before any key: as good as -inf, but can be subtracted


def _attend_in_torch(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    pages: MemoryPages | None,
    table: MemoryTable | None,
    shared: SharedSegment | None,
    *,
    scale: float,
    row_slot: Tensor,
    soft_cap: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] in fp32, vectorised as in ``paged_torch``."""
    _, query_heads, size = query.shape
    heads = (shared if pages is None else pages).keys.shape[-3]
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], -torch.inf)
    slots = row_slot.numpy()
    for rows in paged_torch.split(query_start_loc.numpy(), seq_lens.numpy(), heads * size):
        picked, slot = rows.tokens(), slots[rows.row]
        q = query[picked].float().view(len(rows.row), rows.queries, heads, -1, size).permute(2, 0, 3, 1, 4)
        state = (torch.zeros(q.shape), torch.full(q.shape[:-1], NOTHING))
        if shared is not None:
            paged_torch.add_shared(state, q, shared, slot, rows.positions(), scale, soft_cap)
        if pages is not None:
            paged_torch.add_pages(state, q, pages, table, slot, rows.positions(), scale, soft_cap)
        value, log_sum = state
        log_sum = log_sum.masked_fill(log_sum == NOTHING, -torch.inf)
        out[picked] = value.permute(1, 3, 0, 2, 4).reshape(-1, query_heads, size)
        lse[picked] = log_sum.permute(1, 3, 0, 2).reshape(-1, query_heads)
    return out, lse
