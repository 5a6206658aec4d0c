"""Where the tokens of a tile lie, who sees them, and what they are worth: a row's memory, and its context.
And the room that attention to a tile takes."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.common.pointers import pointer
from mem_triton.ops.memory_attention.cpu.numba_floats import TILE
from mem_triton.ops.memory_attention.cpu.numba_tiles import COLUMNS, ROWS
from mem_triton.ops.memory_attention.cpu.numba_vectors import LANES

NEVER = np.int32(2**31 - 1)


@njit(**OPTIONS)
def room_bytes(many, size):
    """What ``room_at`` takes."""
    return 4 * many * (3 * size + 2 * TILE) + 24 * (many + LANES) + 8 * size * TILE + 32 * TILE + 256


@njit(**OPTIONS)
def room_at(at, many, size):
    """What blocks of ``many`` queries need for any tile, in the memory from ``at`` on; whole cache lines each."""
    tall = many + -many % LANES
    wide, tile, row, quads = max(size, TILE), 4 * TILE, 4 * many * size, np.int64((many + 3) // 4)
    at += -at % 64
    keys, values = at, at + tile * size
    lists = values + tile * size
    logits = lists + 7 * tile + 64
    q, acc = logits + many * tile, logits + many * tile + row
    q16, p16 = acc + row, acc + row + 2 * many * wide
    rows = p16 + 2 * many * wide
    return (
        carray(pointer(q), (many, size), np.float32),
        carray(pointer(acc), (many, size), np.float32),
        carray(pointer(logits), (many, TILE), np.float32),
        carray(pointer(q16), (many, wide), np.uint16),
        carray(pointer(p16), (many, wide), np.uint16),
        keys,
        values,
        carray(pointer(lists), (2, TILE), np.int64),
        carray(pointer(lists + 4 * tile), (2, TILE), np.int32),
        carray(pointer(lists + 6 * tile), TILE, np.float32),
        carray(pointer(rows), many, np.float32),
        carray(pointer(rows + 4 * tall), many, np.float32),
        carray(pointer(rows + 8 * tall), many, np.int32),
        carray(pointer(rows + 12 * tall), quads, np.int64),
        carray(pointer(lists + 7 * tile), 3, np.int64),
    )


@njit(**OPTIONS)
def number(address, index):
    """A number of a list of int32."""
    return carray(pointer(address), index + 1, np.int32)[index]


@njit(**OPTIONS)
def list_memory(slot, head, step, layer, cursor, first, last, listed, seen, worth):
    """List the next tokens of a slot's shared segment and pages, up to a full tile, and move the cursor past them:
    shared tokens, table entries, tokens of the entry. first, last: positions of the queries. Returns how many."""
    n = np.int64(0)
    if layer.shared_tokens > cursor[0]:
        begin, end = number(step.shared_first, slot), number(step.shared_end, slot)
        if begin > last or end <= first:
            cursor[0] = layer.shared_tokens
        run = min(TILE, layer.shared_tokens - cursor[0])
        at = layer.shared_keys + head * layer.shared_head + cursor[0] * layer.shared_token
        _list(n, run, at, layer.shared_token, layer.shared_values, listed)
        seen[0, :run], seen[1, :run], worth[:run] = begin, end, layer.shared_bias
        cursor[0], n = cursor[0] + run, run
    count = np.int64(number(step.counts, slot)) if layer.pages else np.int64(0)
    while cursor[1] < count and n < TILE:
        entry = slot * step.columns + cursor[1]
        begin, end, tokens = number(step.first, entry), number(step.end, entry), number(step.tokens, entry)
        run = min(TILE - n, tokens - cursor[2])
        if begin > last or end <= first:
            run = 0
        bias = carray(pointer(step.bias), entry + 1, np.float32)[entry] if step.bias else np.float32(0)
        at = layer.pages + number(step.page, entry) * layer.page_step + head * layer.page_head
        _list(n, run, at + cursor[2] * layer.page_token, layer.page_token, layer.page_values, listed)
        seen[0, n : n + run], seen[1, n : n + run], worth[n : n + run] = begin, end, bias
        n, cursor[2] = n + run, cursor[2] + run
        if run == 0 or cursor[2] == tokens:
            cursor[1], cursor[2] = cursor[1] + 1, 0
    return n


@njit(**OPTIONS)
def _list(n, count, at, step, values, listed):
    """List ``count`` tokens from the ``n``-th place on: their keys from ``at`` on, their values ``values`` behind."""
    for i in range(count):
        listed[0, n + i] = at + i * step
        listed[1, n + i] = at + i * step + values


@njit(**OPTIONS)
def list_context(row, head, step, layer, token, last, listed, seen, worth):
    """List a row's keys from position ``token`` to ``last``, up to a full tile; of packed blocks up to the block's end,
    but for fp32 by channel, where a tile may be several whole ones. Returns how many, and the last one's block."""
    block, table = layer.block, step.blocks + row * step.blocks_row
    here = min(TILE, last + 1 - token)
    if layer.kind != ROWS and not (layer.kind == COLUMNS and layer.wide == 4 and TILE % block == 0):
        here = min(here, block - token % block)
    base, n = np.int64(0), np.int64(0)
    while n < here:
        index = (token + n) // block
        inside = token + n - index * block
        run = min(block - inside, here - n)
        base = layer.keys + number(table, index) * layer.block_step + head * layer.head_step
        _list(n, run, base + inside * layer.token_step, layer.token_step, layer.values, listed)
        n += run
    for i in range(here):
        seen[0, i] = token + i
    seen[1, :here], worth[:here] = NEVER, np.float32(0)
    return here, base
