"""Tiles of attention compiled by numba: logits, the running softmax, and the weighted sum.

A tile is up to TILE tokens of one KV head, and some rows of queries. Addresses and words as in ``numba_vectors``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.common.pointers import pointer
from mem_triton.ops.memory_attention.cpu.numba_floats import TILE, as_float, exp2, rounded
from mem_triton.ops.memory_attention.cpu.numba_softmax import weigh, weights_of
from mem_triton.ops.memory_attention.cpu.numba_vectors import (
    GROUP,
    LANES,
    interleave,
    multiply_floats,
    multiply_listed,
    multiply_pairs,
    transpose,
)

ROWS, COLUMNS, PAIRS = 0, 1, 2  # how a tile's tokens lie: anywhere, listed; the two orders of ``packing``
FLOATS, LISTED, OF_PAIRS = 0, 1, 2
_ZERO = np.float32(0)


@njit(**OPTIONS)
def address(array):
    """Of an array's first element."""
    return np.int64(array.ctypes.data)


@njit(**OPTIONS)
def multiply(way, data, step, turn, groups, turns, f, f_row, out, out_row, many):
    """Products as ``numba_vectors`` has them, of up to four rows and any number of groups."""
    group = 0
    while group < groups:
        left = groups - group
        wide = 4 if left >= 4 else 2 if left >= 2 else 1
        to = out + group * GROUP
        if way == LISTED:
            multiply_listed(many, wide, data, step, turn + group * step, turns, f, f_row, to, out_row)
        elif way == FLOATS:
            multiply_floats(many, wide, data + group * step, step, turn, turns, f, f_row, to, out_row)
        else:
            multiply_pairs(many, wide, data + group * step, step, turn, turns, f, f_row, to, out_row)
        group += wide


@njit(**OPTIONS)
def fold(logits, reach, seen_from, seen_to, worth, position, scale, soft_cap, top, total, acc):
    """Make weights of a tile's products, and update the running softmax. Logits are in base 2 from here on.

    reach: how many tokens of the tile each four rows may see; a row sees those whose ``seen_from`` is not behind its
    position and whose ``seen_to`` is. worth: added to each token's logit. scale, soft_cap: as in ``AttentionCall``.
    """
    log2e, nothing = np.float32(1.4426950408889634), np.float32(-np.inf)
    factor = scale * log2e
    worth_at, from_at, to_at = address(worth), address(seen_from), address(seen_to)
    for m in range(len(top)):
        groups = (reach[m // 4] + LANES - 1) // LANES
        x, before = logits[m], top[m]
        at = address(x)
        if soft_cap > 0:
            for n in range(groups * LANES):
                x[n] = soft_cap * math.tanh(x[n] * scale / soft_cap) / scale
        highest = max(before, weigh(at, groups, factor, worth_at, log2e, from_at, to_at, position[m]))
        if highest == nothing:
            x[: groups * LANES] = _ZERO
            continue
        tile_total = weights_of(at, groups, highest)
        top[m] = highest
        if before == highest:
            total[m] += tile_total
            continue
        shrink = exp2(before - highest) if before > nothing else _ZERO
        total[m] = total[m] * shrink + tile_total
        sums = acc[m]
        for d in range(len(sums)):
            sums[d] *= shrink


@njit(**OPTIONS)
def as_bf16(weights, reach, out):
    """Each row's weights in whole groups as bf16 in uint16."""
    like = np.uint16(0)
    for m in range(len(weights)):
        x, y = weights[m], out[m]
        for n in range((reach[m // 4] + LANES - 1) // LANES * LANES):
            y[n] = rounded(x[n], like)


@njit(**OPTIONS)
def keys_of_rows(listed, count, words, out):
    """The words of listed tokens as [groups, words, 16 tokens]."""
    for group in range((count + LANES - 1) // LANES):
        here = min(LANES, count - group * LANES)
        for block in range(0, words, LANES):
            to = out + (group * words + block) * GROUP
            transpose(listed + 8 * LANES * group, here, 4 * block, to)


@njit(**OPTIONS)
def keys_of_columns(keys, turn, count, size, out):
    """bf16 by channel, ``turn`` bytes apart, as [groups, size / 2, 16 tokens] pairs. Reads whole 32 tokens."""
    half = size // 2
    for d in range(half):
        for group in range(0, (count + LANES - 1) // LANES, 2):
            at = keys + 2 * d * turn + 2 * LANES * group
            interleave(at, at + turn, out + (group * half + d) * GROUP, half * GROUP)


@njit(**OPTIONS)
def values_as_pairs(listed, count, size, out, width):
    """bf16 of listed tokens as [size / 16, width, 16 channels] pairs of two tokens; of an odd last one both halves."""
    at = carray(pointer(listed), TILE, np.int64)
    for n in range(0, count, 2):
        first, second = at[n], at[n + 1] if n + 1 < count else at[n]
        for d in range(0, size, 2 * LANES):
            to = out + (d // LANES * width + n // 2) * GROUP
            interleave(first + 2 * d, second + 2 * d, to, width * GROUP)


@njit(**OPTIONS)
def as_floats(kind, keys, values, key_at, value_at, count, size, block, key_out, value_out):
    """bf16 of any order in fp32: keys as [groups, size, 16 tokens], values as [count, size]; ``value_at`` then lists
    these. keys, values: addresses of the first token of a packed block of ``block`` tokens; else the lists say."""
    half = size // 2
    to = carray(pointer(key_out), (TILE // LANES, size, LANES), np.float32)
    for n in range(count):
        key, value = carray(pointer(key_at[n]), size, np.uint16), carray(pointer(value_at[n]), size, np.uint16)
        out = carray(pointer(value_out + 4 * n * size), size, np.float32)
        if kind == COLUMNS:
            key = carray(pointer(keys + 2 * n), block * size, np.uint16)[::block]
        for d in range(size):
            if kind == PAIRS:
                place = 2 * LANES * (n // LANES * half + d // 2) + 2 * (n % LANES) + d % 2
                other = 2 * LANES * (d // LANES * (block // 2) + n // 2) + 2 * (d % LANES) + n % 2
                k = carray(pointer(keys + 2 * place), 1, np.uint16)[0]
                v = carray(pointer(values + 2 * other), 1, np.uint16)[0]
            else:
                k, v = key[d], value[d]
            to[n // LANES, d, n % LANES], out[d] = as_float(k), as_float(v)
        value_at[n] = value_out + 4 * n * size


@njit(**OPTIONS)
def first_of_pair(pairs, step, size, out):
    """A group of pairs for each 16 channels, with zeros for their second tokens."""
    for group in range(size // LANES):
        x = carray(pointer(pairs + group * step), LANES, np.uint32)
        y = carray(pointer(out + group * GROUP), LANES, np.uint32)
        for n in range(LANES):
            y[n] = x[n] & np.uint32(0xFFFF)
