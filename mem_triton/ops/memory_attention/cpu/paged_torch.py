"""``memory_attention`` on a CPU: vectorised over rows, heads and queries, fp32 arithmetic.

Rows with as many queries are attended together. First every row's context, the same way whatever memory the rows have;
then memory for the rows that have some, merged by log-sum-exp. So a row without memory gets the bits of a call without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.packing import unpack_keys, unpack_values
from mem_triton.ops.memory_attention.arguments.types import (
    AttentionCall,
    MemoryPages,
    PagedContext,
)
from mem_triton.ops.memory_attention.cpu.torch_parts import buckets, clear, dequantise, gather, merge, softmax

QUERY_CHUNK = 512  # a chunk of queries skips the keys behind it


class Rows(NamedTuple):
    """Rows of the batch with as many queries each, or chunks of rows. Arrays of one integer a row."""

    row: np.ndarray
    begin: np.ndarray  # first query token
    length: np.ndarray  # keys that the last query sees
    queries: int

    def positions(self) -> np.ndarray:
        """Of the queries, [n, T]."""
        return (self.length - self.queries)[:, None] + np.arange(self.queries)

    def tokens(self) -> slice | Tensor:
        """Where the queries are in the packed batch."""
        if (np.diff(self.begin) == self.queries).all():
            return slice(int(self.begin[0]), int(self.begin[-1]) + self.queries)
        return torch.from_numpy((self.begin[:, None] + np.arange(self.queries)).ravel())


def attend(call: AttentionCall, skipped: np.ndarray | None = None) -> None:
    """Attend a call that is already checked. skipped: a flag for each row that is not attended."""
    query, context, out, sinks, lse = call.query, call.context, call.out, call.sinks, call.lse
    kv_heads, size = context.keys.shape[1], query.shape[2]
    slots = None if call.row_slot is None else call.row_slot.numpy()
    for rows in split(context.query_start_loc.numpy(), context.seq_lens.numpy(), kv_heads * size, skipped):
        tokens, count = rows.tokens(), rows.queries
        q = query[tokens].float().view(len(rows.row), count, kv_heads, -1, size).permute(2, 0, 3, 1, 4)  # [Hkv,n,G,T,D]
        state = _attend_context(q, context, rows, call.scale, call.soft_cap)
        if slots is not None:
            slot = slots[rows.row]
            if call.shared is not None:
                add_shared(state, q, call, slot, rows.positions())
            if call.pages is not None:
                add_pages(state, q, call, slot, rows.positions())
        value, log_sum = state
        if sinks is not None:
            total = torch.logaddexp(log_sum, sinks.view(kv_heads, 1, -1, 1))
            value, log_sum = value * torch.exp(log_sum - total).unsqueeze(-1), total
        out[tokens] = value.permute(1, 3, 0, 2, 4).reshape(-1, *out.shape[1:]).to(out.dtype)
        if lse is not None:
            lse[tokens] = log_sum.permute(1, 3, 0, 2).reshape(-1, lse.shape[1])


def split(starts: np.ndarray, lengths: np.ndarray, width: int, skipped: np.ndarray | None = None) -> Iterator[Rows]:
    """Groups of rows that go together; padding rows, which have no queries, and rows that are ``skipped`` are in none.

    width: floats of a token's keys. skipped: a flag a row.
    """
    counts = starts[1:] - starts[:-1]
    if skipped is not None:
        counts = np.where(skipped, 0, counts)
    row, begin, length = np.arange(len(counts)), starts[:-1], lengths
    if len(counts) and counts.max() > QUERY_CHUNK:
        chunks = -(-counts // QUERY_CHUNK)
        row = row.repeat(chunks)
        done = QUERY_CHUNK * (np.arange(len(row)) - (np.cumsum(chunks) - chunks).repeat(chunks))
        rest = counts[row] - done
        counts = np.minimum(rest, QUERY_CHUNK)
        begin, length = begin[row] + done, lengths[row] - rest + counts
    for queries in sorted(set(counts.tolist()) - {0}):
        same = np.flatnonzero(counts == queries)
        for group in buckets(length[same], width):
            pick = same[group]
            yield Rows(row[pick], begin[pick], length[pick], queries)


def _attend_context(
    q: Tensor, context: PagedContext, rows: Rows, scale: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    lengths, packing = rows.length, context.packing
    block_size = context.keys.shape[2] if packing is None else packing.tokens
    longest, queries = int(lengths.max()), q.shape[3]
    blocks = -(-lengths // block_size)
    column = np.minimum(np.arange(blocks.max()), blocks[:, None] - 1)  # [n, blocks]
    picked = torch.from_numpy(context.block_table.numpy()[rows.row[:, None], column].ravel())
    alike = bool((lengths == longest).all())
    keys, values = (x.view(len(q), len(blocks), -1, q.shape[-1])[:, :, :longest] for x in _blocks(context, picked))
    mask = None
    if not alike:
        clear(keys, values, np.arange(longest) >= lengths[:, None])
    causal = alike and queries == longest and queries > 1
    if not causal and (queries > 1 or not alike):
        visible = np.arange(longest) <= rows.positions()[:, :, None]  # [n, T, L]
        mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -math.inf)
    return softmax(q, keys, values, mask, scale, soft_cap, causal)


def _blocks(context: PagedContext, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some blocks, [Hkv, blocks, N, D] in fp32."""
    keys, values = gather(context.keys, picked), gather(context.values, picked)
    if context.packing is not None:
        keys = unpack_keys(keys, context.packing).contiguous()
        values = unpack_values(values, context.packing).contiguous()
    return keys, values


def add_shared(
    state: tuple[Tensor, Tensor], q: Tensor, call: AttentionCall, slot: np.ndarray, positions: np.ndarray
) -> None:
    """Merge the shared segment into ``state``, of queries of rows with these slots at these positions."""
    shared, known = call.shared, np.maximum(slot, 0)
    first, end = shared.first.numpy()[known, None], shared.end.numpy()[known, None]
    visible = (slot >= 0)[:, None] & (first <= positions) & (positions < end)  # [n, T]
    pick = np.flatnonzero(visible.any(1))
    if not len(pick) or shared.keys.shape[1] == 0:
        return
    keys, values = dequantise(shared.keys, shared.values, shared.key_scale, shared.value_scale)  # [Hkv, S, D]
    some = q if len(pick) == len(slot) else q[:, torch.from_numpy(pick)]
    flat = some.reshape(len(q), 1, -1, 1, q.shape[-1])  # the queries of all rows at once
    value, log_sum = softmax(flat, keys.unsqueeze(1), values.unsqueeze(1), None, call.scale, call.soft_cap)
    log_sum = log_sum.view(some.shape[:-1]) + shared.bias  # [Hkv, n, G, T]
    if not visible[pick].all():
        log_sum.masked_fill_(torch.from_numpy(~visible[pick])[:, None], -math.inf)
    merge(state, pick, value.view(some.shape), log_sum)


def add_pages(
    state: tuple[Tensor, Tensor], q: Tensor, call: AttentionCall, slot: np.ndarray, positions: np.ndarray
) -> None:
    """Merge each row's pages into ``state``, of queries of rows with these slots at these positions."""
    pages, table = call.pages, call.table
    known, size = np.maximum(slot, 0), pages.keys.shape[2]
    page, tokens, first, end = (x.numpy()[known] for x in table[:4])  # [n, M]
    bias = None if table.bias is None else table.bias.numpy()[known]
    used = (np.arange(page.shape[1]) < table.count.numpy()[known, None]) & (slot >= 0)[:, None] & (tokens > 0)
    used &= (first <= positions[:, -1:]) & (end > positions[:, :1])
    counts = used.sum(1)
    some = np.flatnonzero(counts)
    for bucket in buckets(counts[some] * size, q.shape[0] * q.shape[-1]) if len(some) else ():
        pick = some[bucket]
        place = np.arange(counts[pick].max())
        real = place < counts[pick, None]  # [n, C]
        column = np.where(
            real, np.argsort(~used[pick], axis=1, kind="stable")[:, : len(place)], used[pick].argmax(1)[:, None]
        )
        index = (pick[:, None], column)
        filled = real[:, :, None] & (np.arange(size) < tokens[index][:, :, None])  # [n, C, P]
        at = positions[pick][:, :, None]
        seen = (first[index][:, None] <= at) & (at < end[index][:, None])  # [n, T, C]
        keys, values = _read_pages(pages, torch.from_numpy(page[index].ravel()), len(pick))
        mask = None
        if not filled.all():
            clear(keys, values, ~filled.reshape(len(pick), -1))
        if bias is not None or not (filled.all() and seen.all()):
            worth = np.float32(0) if bias is None else bias[index][:, None, :, None]
            mask = np.where(filled[:, None] & seen[..., None], worth, np.float32(-np.inf))  # [n, T, C, P]
            mask = torch.from_numpy(mask.reshape(len(pick), -1, keys.shape[2]))
        value, log_sum = softmax(q[:, torch.from_numpy(pick)], keys, values, mask, call.scale, call.soft_cap)
        merge(state, pick, value, log_sum)


def _read_pages(pages: MemoryPages, picked: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, n, C * P, D] in fp32."""
    keys, values, key_scale, value_scale = (None if x is None else gather(x, picked) for x in pages)
    if key_scale is not None:
        keys.mul_(key_scale.unsqueeze(-2)), values.mul_(value_scale.unsqueeze(-1))
    return keys.view(len(keys), rows, -1, keys.shape[-1]), values.view(len(keys), rows, -1, keys.shape[-1])
