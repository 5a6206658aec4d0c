"""Rows of few queries, each KV head alone: memory and context in one softmax, tile by tile; see ``paged_numba``."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.memory_attention.cpu.numba_bf16 import (
    add_groups,
    logits_of_groups,
    words_of_keys,
    words_of_values,
)
from mem_triton.ops.memory_attention.cpu.numba_floats import LANES, TILE, as_float, rounded
from mem_triton.ops.memory_attention.cpu.numba_tiles import (
    add_pairs,
    add_rows,
    as_bf16,
    fold,
    logits_of_columns,
    logits_of_pairs,
    logits_of_rows,
)


@njit(**OPTIONS)
def _attend_tile(kind, data, words, base, inside, strides, here, bias, softmax, room, fast):
    """Attend ``here`` tokens from the ``inside``-th of a block on, whose KV head begins at ``base``."""
    keys, values = data
    key_words, value_words = words
    block, token = strides
    q, q_words, limit, scale, soft_cap, top, total, acc = softmax
    logits, p16, p_words, scratch, row = room
    many, size = q.shape
    at = base + inside * token
    if kind == 1:
        logits_of_columns(q, keys, base + inside, block, here, logits)
    elif fast:
        half, flat = size // 2, logits.reshape(-1)
        groups = (here + LANES - 1) // LANES
        if kind == 2:
            logits_of_groups(key_words, (base + inside * size) // 2, groups, half, q_words, many, flat, 0, TILE)
        else:
            for group in range(groups):
                n = group * LANES
                words_of_keys(keys, at + n * token, token, min(LANES, here - n), size, scratch, n * half)
            logits_of_groups(scratch, 0, groups, half, q_words, many, flat, 0, TILE)
    elif kind == 2:
        logits_of_pairs(q, key_words, (base + inside * size) // 2, here, logits)
    else:
        logits_of_rows(q, keys, at, token, here, logits, row)
    fold(logits, here, limit, scale, bias, soft_cap, top, total, acc)
    if not fast:
        if kind == 2:
            add_pairs(logits, value_words, base // 2 + inside * 8, block * 8, here, acc)
        else:
            add_rows(logits, values, at, token, here, acc)
        return
    as_bf16(logits, here, p16)
    pairs, half, flat, every = here // 2, TILE // 2, acc.reshape(-1), np.uint32(0xFFFFFFFF)
    if kind != 2:
        words_of_values(values, at, token, here, size, scratch, half * LANES)
        add_groups(scratch, 0, half * LANES, (here + 1) // 2, every, p_words, 0, half, many, flat, size)
        return
    first, step = base // 2 + inside * 8, block * 8
    add_groups(value_words, first, step, pairs, every, p_words, 0, half, many, flat, size)
    if here % 2 == 1:  # its other token may be anything
        add_groups(
            value_words, first + pairs * LANES, step, 1, np.uint32(0xFFFF), p_words, pairs, half, many, flat, size
        )


@njit(**OPTIONS)
def _attend_one(
    row, head, query, out, lse, shape, block_table, starts, lengths, slots, cache, words, of_context, page_data,
    of_pages, entries, counts, bias, shared_data, of_shared, shared_range, shared_bias, scale, soft_cap, sinks, fast,
):  # fmt: skip
    """One row's queries of one KV head."""
    heads, query_heads, size, query_row, query_head, out_row, out_head, lse_row, table_row, width = shape
    begin, count = starts[row], starts[row + 1] - starts[row]
    group, last = query_heads // heads, lengths[row] - 1
    many, first = count * group, lengths[row] - count
    q, acc = np.empty((many, size), np.float32), np.zeros((many, size), np.float32)
    q16, p16 = np.empty((many, size), np.uint16), np.empty((many, TILE), np.uint16)
    top, total = np.full(many, np.float32(-np.inf)), np.zeros(many, np.float32)
    limit, log2e, one = np.empty(many, np.int64), np.float32(1.4426950408889634), np.float32(0)
    for m in range(many):
        at, target = (begin + m // group) * query_row + (head * group + m % group) * query_head, q[m]
        source = query[at : at + size]
        for d in range(size):
            target[d] = as_float(source[d])
    as_bf16(q, size, q16)
    room = (
        np.empty((many, TILE), np.float32), p16, p16.view(np.uint32).reshape(-1),
        np.empty(max(size, 64) * TILE // 2, np.uint32), np.empty(size, np.float32),
    )  # fmt: skip
    softmax = (q, q16.view(np.uint32).reshape(-1), limit, scale, soft_cap, top, total, acc)

    slot = slots[row]
    if slot >= 0 and of_shared[2] > 0:
        for m in range(many):
            position = first + m // group
            sees = shared_range[0][slot] <= position and position < shared_range[1][slot]
            limit[m] = of_shared[2] if sees else 0
        if limit.max() > 0:
            for n in range(0, of_shared[2], TILE):
                here, strides = min(TILE, of_shared[2] - n), (0, of_shared[1])
                if n > 0:
                    limit -= TILE
                base = head * of_shared[0]
                _attend_tile(0, shared_data, words, base, n, strides, here, shared_bias, softmax, room, fast)
    if slot >= 0 and len(counts) > 0:
        for m in range(counts[slot]):
            entry = np.int64(slot) * width + m
            tokens, sees_from, sees_to = entries[1][entry], entries[2][entry], entries[3][entry]
            if tokens == 0 or sees_from > last or sees_to <= first:
                continue
            for i in range(many):
                position = first + i // group
                limit[i] = tokens if sees_from <= position and position < sees_to else 0
            worth = bias[entry] if len(bias) > 0 else one
            base = np.int64(entries[0][entry]) * of_pages[0] + head * of_pages[1]
            for n in range(0, tokens, TILE):
                here, strides = min(TILE, tokens - n), (0, of_pages[2])
                _attend_tile(0, page_data, words, base, n, strides, here, worth, softmax, room, fast)

    block, n = of_context[1], 0
    strides = (block, of_context[4])
    while n <= last:
        inside = n % block
        here = min(min(block - inside, TILE), last + 1 - n)
        base = np.int64(block_table[row * table_row + n // block]) * of_context[2] + head * of_context[3]
        for m in range(many):
            limit[m] = min(max(first + m // group + 1 - n, 0), here)
        _attend_tile(of_context[0], cache, words, base, inside, strides, here, one, softmax, room, fast)
        n += here

    for m in range(many):
        h = head * group + m % group
        if len(sinks) > 0:
            sink = sinks[h] * log2e
            highest = max(sink, top[m])
            shrink = np.float32(2) ** (top[m] - highest)
            total[m] = total[m] * shrink + np.float32(2) ** (sink - highest)
            top[m] = highest
            acc[m] *= shrink
        share = np.float32(1) / total[m] if total[m] > 0 else np.float32(0)
        at = (begin + m // group) * out_row + h * out_head
        target, sums = out[at : at + size], acc[m]
        for d in range(size):
            target[d] = rounded(sums[d] * share, out[0])
        if len(lse) > 0:
            lse[(begin + m // group) * lse_row + h] = (
                (top[m] + math.log2(total[m])) / log2e if total[m] > 0 else -np.inf
            )


@njit(**OPTIONS)
def serial(query, out, lse, rows, shape, *rest):
    heads = shape[0]
    for i in range(len(rows) * heads):
        _attend_one(rows[i // heads], i % heads, query, out, lse, shape, *rest)


@njit(parallel=True, **OPTIONS)
def parallel(
    query, out, lse, rows, shape, block_table, starts, lengths, slots, cache, words, of_context, page_data, of_pages,
    entries, counts, bias, shared_data, of_shared, shared_range, shared_bias, scale, soft_cap, sinks, fast,
):  # fmt: skip
    """The same by several threads; numba hands no tuples to them."""
    heads, d1, d2, d3, d4, d5, d6, d7, d8, d9 = shape
    k, v = cache
    kw, vw = words
    c0, c1, c2, c3, c4 = of_context
    pk, pv = page_data
    p0, p1, p2 = of_pages
    e0, e1, e2, e3 = entries
    sk, sv = shared_data
    s0, s1, s2 = of_shared
    r0, r1 = shared_range
    for i in prange(len(rows) * heads):
        _attend_one(
            rows[i // heads], i % heads, query, out, lse, (heads, d1, d2, d3, d4, d5, d6, d7, d8, d9),
            block_table, starts, lengths, slots, (k, v), (kw, vw), (c0, c1, c2, c3, c4), (pk, pv), (p0, p1, p2),
            (e0, e1, e2, e3), counts, bias, (sk, sv), (s0, s1, s2), (r0, r1), shared_bias, scale, soft_cap, sinks,
            fast,
        )  # fmt: skip
