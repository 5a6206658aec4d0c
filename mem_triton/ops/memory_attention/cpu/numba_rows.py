"""Blocks of queries of a row and a KV head: memory and context in one softmax, tile by tile; see ``paged_numba``."""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, prange

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.common.pointers import pointer
from mem_triton.ops.memory_attention.cpu.numba_floats import TILE, as_float, rounded
from mem_triton.ops.memory_attention.cpu.numba_lists import (
    NEVER,
    list_context,
    list_memory,
    number,
    room_at,
    room_bytes,
)
from mem_triton.ops.memory_attention.cpu.numba_tiles import (
    COLUMNS,
    FLOATS,
    LISTED,
    OF_PAIRS,
    PAIRS,
    ROWS,
    address,
    as_bf16,
    as_floats,
    first_of_pair,
    fold,
    keys_of_columns,
    keys_of_rows,
    multiply,
    values_as_pairs,
)
from mem_triton.ops.memory_attention.cpu.numba_vectors import GROUP, LANES


@njit(inline="always", **OPTIONS)
def _attend_tile(kind, here, keys, values, layer, room):
    """Attend ``here`` tokens, whose places, ranges and worth are listed. keys, values: addresses of packed ones."""
    q, acc, logits, q16, p16, key_to, value_to, listed, seen, worth, top, total, position, reach, _ = room
    many, p_row, block = len(q), 2 * q16.shape[1], layer.block
    size, fast = layer.size, layer.dot != 0
    key_at = address(listed)
    value_at, logits_at, acc_at = key_at + 8 * TILE, address(logits), address(acc)
    row, q_at, q16_at = 4 * TILE, address(q), address(q16)
    data, step, turn = key_to, size * GROUP, GROUP
    if layer.wide == 2 and not fast:
        as_floats(kind, keys, values, listed[0], listed[1], here, size, block, key_to, value_to)
    elif kind == ROWS:
        if fast:
            step //= 2
        keys_of_rows(key_at, here, step // GROUP, key_to)
    elif fast:
        step //= 2
        if kind == COLUMNS:
            keys_of_columns(keys, 2 * block, here, size, key_to)
        else:
            data = keys
    else:
        data, step, turn = keys, GROUP, 4 * block
    for m in range(0, many, 4):
        some = min(4, many - m)
        groups = (reach[m // 4] + LANES - 1) // LANES
        logits[m : m + some, : groups * LANES] = np.float32(0)
        out = logits_at + m * row
        if fast:
            multiply(OF_PAIRS, data, step, turn, groups, size // 2, q16_at + m * p_row, p_row, out, row, some)
        elif kind == COLUMNS and here > block:  # of several blocks
            for first in range(0, groups, block // LANES):
                part, at = min(block // LANES, groups - first), listed[0, first * LANES]
                multiply(
                    FLOATS, at, step, turn, part, size, q_at + 4 * m * size, 4 * size, out + first * GROUP, row, some
                )
        else:
            multiply(FLOATS, data, step, turn, groups, size, q_at + 4 * m * size, 4 * size, out, row, some)
    fold(logits, reach, seen[0], seen[1], worth, position, layer.scale, layer.soft_cap, top, total, acc)
    pairs, odd = np.int64(TILE // 2), kind == PAIRS and here % 2 == 1
    if kind == PAIRS:
        pairs, value_to = block // 2, values
    elif fast:
        values_as_pairs(value_at, here, size, value_to, pairs)
    if fast:
        as_bf16(logits, reach, p16)
    for m in range(0, many, 4):
        some = min(4, many - m)
        turns, out = reach[m // 4], acc_at + 4 * m * size
        if not fast:
            p = logits_at + m * row
            multiply(LISTED, value_at, GROUP, 0, size // LANES, turns, p, row, out, 4 * size, some)
            continue
        p, step, rest = address(p16) + m * p_row, pairs * GROUP, odd and turns == here
        turns = turns // 2 if rest else (turns + 1) // 2
        multiply(OF_PAIRS, value_to, step, GROUP, size // LANES, turns, p, p_row, out, 4 * size, some)
        if rest:  # the other token of the last pair may be anything
            first_of_pair(value_to + turns * GROUP, step, size, key_to)
            p += 4 * turns
            multiply(OF_PAIRS, key_to, GROUP, GROUP, size // LANES, 1, p, p_row, out, 4 * size, some)


@njit(inline="always", **OPTIONS)
def _attend_block(row, begin, count, head, step, layer, query, out, lse, place):
    """``count`` queries of a row from the ``begin``-th on, and one KV head.

    query, out, lse: addresses of token 0. place: of the room.
    """
    group, size, wide = layer.group, layer.size, layer.wide
    start = number(step.starts, row)
    first = number(step.lengths, row) - (number(step.starts, row + 1) - start) + begin
    room = room_at(place, count * group, size)
    q, acc, _, q16, _, _, _, listed, seen, worth, top, total, position, reach, cursor = room
    at = query + ((start + begin) * layer.query_row + head * group * layer.query_head) * wide
    for m in range(len(q)):
        source, target = at + (m // group * layer.query_row + m % group * layer.query_head) * wide, q[m]
        if wide == 4:
            target[:] = carray(pointer(source), size, np.float32)
        else:
            x = carray(pointer(source), size, np.uint16)
            for d in range(size):
                target[d] = as_float(x[d])
                q16[m, d] = x[d]
        position[m] = first + m // group
    acc[:], top[:], total[:] = np.float32(0), np.float32(-np.inf), np.float32(0)
    slot = np.int64(number(step.slots, row)) if step.slots else np.int64(-1)
    cursor[:] = 0
    token, last = np.int64(0), first + count - 1
    while True:
        kind, keys, values, here = ROWS, np.int64(0), np.int64(0), 0
        if slot >= 0:
            here = list_memory(slot, head, step, layer, cursor, first, last, listed, seen, worth)
        if here > 0:
            reach[:] = here
        elif token <= last:
            slot, kind = np.int64(-1), layer.kind
            here, base = list_context(row, head, step, layer, token, last, listed, seen, worth)
            if kind == COLUMNS:
                keys = (base if layer.block > TILE else listed[0, 0]) + token % layer.block * wide
            elif kind == PAIRS:
                keys, values = base + token % layer.block * size * 2, base + layer.values + token % layer.block * 32
            for some in range(len(reach)):
                m = min(4 * some + 3, len(q) - 1)
                reach[some] = min(max(position[m] + 1 - token, 0), here)
            token += here
        else:
            break
        for n in range(here, TILE):
            seen[0, n], worth[n] = NEVER, np.float32(0)
        _attend_tile(kind, here, keys, values, layer, room)
    log2e = np.float32(1.4426950408889634)
    for m in range(len(q)):
        h, token = head * group + m % group, start + begin + m // group
        if layer.sinks:
            sink = carray(pointer(layer.sinks), h + 1, np.float32)[h] * log2e
            highest = max(sink, top[m])
            shrink = np.float32(2) ** (top[m] - highest)
            total[m] = total[m] * shrink + np.float32(2) ** (sink - highest)
            top[m] = highest
            acc[m] *= shrink
        share, sums = np.float32(1) / total[m] if total[m] > 0 else np.float32(0), acc[m]
        target = out + (token * layer.out_row + h * layer.out_head) * wide
        if wide == 4:
            y = carray(pointer(target), size, np.float32)
            for d in range(size):
                y[d] = sums[d] * share
        else:
            z = carray(pointer(target), size, np.uint16)
            for d in range(size):
                z[d] = rounded(sums[d] * share, np.uint16(0))
        if lse:
            place = token * layer.lse_row + h
            carray(pointer(lse), place + 1, np.float32)[place] = (
                (top[m] + math.log2(total[m])) / log2e if total[m] > 0 else -np.inf
            )


@njit(**OPTIONS)
def attend_some(first, every, blocks, steps, layers, query, out, lse):
    """Every ``every``-th block of queries and KV head from the ``first`` on."""
    step, layer = steps[0], layers[0]
    room = np.empty(room_bytes(blocks[:, 2].max() * layer.group, layer.size), np.uint8)
    heads = layer.heads
    for i in range(first, len(blocks) * heads, every):
        row, begin, count = blocks[i // heads]
        _attend_block(
            np.int64(row), np.int64(begin), np.int64(count), i % heads, step, layer, query, out, lse, address(room)
        )


@njit(parallel=True, **OPTIONS)
def parallel(threads, blocks, steps, layers, query, out, lse):
    """The same by several threads."""
    for thread in prange(threads):
        attend_some(thread, threads, blocks, steps, layers, query, out, lse)
