"""Attention over memory alone, with its log-sum-exp, so that any backend that returns one can do the context.

The engine's own attention (FlashAttention 3, say) writes output and log-sum-exp of the context; ``add_memory`` merges
the memories into them, in place. Or ``memory_only_attention`` returns the memories' own, for ``merge_states``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.checks import check
from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.cpu import paged_torch


def memory_only_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attend each query to its row's memory pages and the shared segment; the context is left to another kernel.

    call: see ``AttentionCall``; its context is ``PagedContext.elsewhere``. Sinks belong to the context's softmax, and
    ``out`` and ``lse`` are not written, but
    returned: out [T, Hq, D] in the query's dtype and lse fp32 [T, Hq], natural logarithm; 0 and -inf for every token
    that sees no memory, padding included, so that a merge leaves it as it is.

    No host sync and no data-dependent shape on a GPU. ValueError names the tensor that does not fit. Example::

        rows = PagedContext.elsewhere(starts, lengths, 1)
        memory_out, memory_lse = memory_only_attention(
            AttentionCall(query, rows, None, 64**-0.5, row_slot=slots, pages=pages, table=table)
        )
        merge_states(context_out, context_lse, memory_out, memory_lse, context_out)
    """
    query = call.query
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    call = call._replace(out=out, lse=lse)
    _check(call)
    if query.device.type == "cpu":
        value, log_sum = _attend_in_torch(call)
        return out.copy_(value), log_sum
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch  # Triton is there on Linux only

    if call.pages is not None:
        cascade_launch.attend_pages(call)
    else:
        out.zero_()
        lse.fill_(-torch.inf)
    if call.shared is not None:
        cascade_launch.attend_shared(call)
    return out, lse


def add_memory(call: AttentionCall) -> None:
    """Merge memory into another backend's attention over the context, in place.

    call: as in ``memory_only_attention``, but with ``out``, [T, Hq, D] in the query's dtype, the backend's output, and
    ``lse``, fp32 [T, Hq] with any strides (FlashAttention's [Hq, T] is ``lse.t()``), its log-sum-exp, sinks included.
    Both become those of memory and context; tokens that see no memory keep their bits. One launch for the pages, one
    for the shared segment; none of them needs another tensor. Example::

        out, lse = flash_attention(..., return_softmax_lse=True)
        rows = PagedContext.elsewhere(starts, lengths, 512)
        add_memory(AttentionCall(query, rows, out, 64**-0.5, slots, pages, table, lse=lse.t()))
    """
    _check(call)
    if call.query.device.type == "cpu":
        out, lse = call.out, call.lse
        value, log_sum = _attend_in_torch(call)
        pick = (log_sum > -torch.inf).any(1)  # heads of a token see the same keys
        merged, total = out[pick], lse[pick]
        merge_states(merged, total, value[pick], log_sum[pick], merged, total)
        out[pick], lse[pick] = merged, total
        return
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch  # Triton is there on Linux only

    if call.pages is not None:
        cascade_launch.attend_pages(call, merge=True)
    if call.shared is not None:
        cascade_launch.attend_shared(call)


def _check(call: AttentionCall) -> None:
    """The checks of ``memory_attention``, without a KV cache."""
    query, lse = call.query, call.lse
    if call.pages is None and call.shared is None:
        raise ValueError("pages: neither they nor a shared segment were given; there is no memory to attend to")
    if call.context.keys is not None:
        raise ValueError("context: its keys are attended by another kernel; pass PagedContext.elsewhere")
    if call.row_slot is None or call.sinks is not None:
        raise ValueError("row_slot, sinks: the first is needed to find a row's memory, the second are the context's")
    if lse is None or lse.shape != query.shape[:2] or lse.dtype != torch.float32 or lse.device != query.device:
        found = "None" if lse is None else f"{lse.dtype} {tuple(lse.shape)} on {lse.device}"
        raise ValueError(f"lse: {found}, expected float32 [T, Hq] beside query")
    check(call._replace(lse=None))  # of which any strides will do


NOTHING = torch.finfo(torch.float32).min  # the log-sum-exp before any key: as good as -inf, but can be subtracted


def _attend_in_torch(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] in fp32, vectorised as in ``paged_torch``."""
    query, pages, shared = call.query, call.pages, call.shared
    _, query_heads, size = query.shape
    heads = (shared if pages is None else pages).keys.shape[-3]
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], -torch.inf)
    slots = call.row_slot.numpy()
    for rows in paged_torch.split(call.context.query_start_loc.numpy(), call.context.seq_lens.numpy(), heads * size):
        picked, slot = rows.tokens(), slots[rows.row]
        q = query[picked].float().view(len(rows.row), rows.queries, heads, -1, size).permute(2, 0, 3, 1, 4)
        state = (torch.zeros(q.shape), torch.full(q.shape[:-1], NOTHING))
        if shared is not None:
            paged_torch.add_shared(state, q, call, slot, rows.positions())
        if pages is not None:
            paged_torch.add_pages(state, q, call, slot, rows.positions())
        value, log_sum = state
        log_sum = log_sum.masked_fill(log_sum == NOTHING, -torch.inf)
        out[picked] = value.permute(1, 3, 0, 2, 4).reshape(-1, query_heads, size)
        lse[picked] = log_sum.permute(1, 3, 0, 2).reshape(-1, query_heads)
    return out, lse
