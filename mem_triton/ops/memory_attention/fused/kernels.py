"""The fused kernel of memory attention: one softmax over [shared segment | memory pages | context] in one launch.

A program takes one block of a row's queries, one KV head and one split of the tiles that these queries may see,
memory's first. The tiles are dealt out by the row's own lengths, so a row without memory is computed as if nobody had
any. The last split to finish merges all of them.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import find_block
from mem_triton.ops.memory_attention.fused.kernel_output import join_splits, store_outputs
from mem_triton.ops.memory_attention.fused.kernel_pages import attend_pages, seen_columns
from mem_triton.ops.memory_attention.fused.kernel_parts import (
    LOG2E,
    Block,
    asked,
    load_queries,
    nothing_seen,
)
from mem_triton.ops.memory_attention.fused.kernel_tiles import attend_tile


@triton.jit(do_not_specialize=["num_rows", "stride_block_table"])  # no new variant for another batch while serving
def attention_kernel(
    query, output, context, pages, table, shared, splits, logits, num_rows, stride_lse, stride_block_table, HEAD, LAUNCH
):
    """Grid (query blocks, KV heads, splits). Arguments: see ``operands``; LAUNCH: ``launch.Launch``."""
    TOKENS: tl.constexpr = LAUNCH.BLOCK_M // HEAD.GROUP  # query tokens of a block
    row, number, head = tl.program_id(0), 0, tl.program_id(1).to(tl.int64)
    if not LAUNCH.ONE_BLOCK:
        row, number = find_block(query.start_loc, num_rows, row, TOKENS)
    begin, stop = tl.load(query.start_loc + row), tl.load(query.start_loc + row + 1)
    slot = -1
    if query.slot is not None:
        slot = tl.load(query.slot + row)
    queries = asked(begin, stop, number, slot, TOKENS, LAUNCH.PART)
    if queries <= 0:
        return
    m = tl.arange(0, LAUNCH.BLOCK_M)
    first = tl.load(query.seq_lens + row) - queries
    position = first + m // HEAD.GROUP
    last = first + tl.minimum(queries, TOKENS) - 1
    real = (m // HEAD.GROUP < queries) & (m < TOKENS * HEAD.GROUP)
    token = (begin + number * TOKENS + m // HEAD.GROUP).to(tl.int64)
    block = Block(token, head * HEAD.GROUP + m % HEAD.GROUP, position, real, first, last)

    shared_tiles, page_tiles = 0, 0
    if shared.k is not None:
        shared_from, shared_to = tl.load(shared.first + tl.maximum(slot, 0)), tl.load(shared.end + tl.maximum(slot, 0))
        sees_any = (slot >= 0) & (shared_from <= last) & (shared_to > first)
        shared_tiles = tl.where(sees_any, tl.cdiv(shared.tokens, LAUNCH.MEMORY_TILE), 0)
    if pages.k is not None:
        entries = tl.maximum(slot, 0).to(tl.int64) * table.stride
        used = tl.where(slot >= 0, tl.load(table.used + tl.maximum(slot, 0)), 0)
        column, count = seen_columns(table, entries, used, block, LAUNCH.COLUMNS)
        entries += column
        page_tiles = tl.cdiv(count * pages.PAGE_SIZE, LAUNCH.MEMORY_TILE)
    before = shared_tiles + page_tiles
    tiles = before + tl.cdiv(last + 1, LAUNCH.TILE)
    low, high, parts = 0, tiles, 1
    if LAUNCH.SPLIT:
        share = tl.maximum(tl.cdiv(tiles, tl.num_programs(2)), LAUNCH.MIN_TILES)
        parts = tl.cdiv(tiles, share)
        if tl.program_id(2) >= parts:
            return
        low = tl.program_id(2) * share
        high = tl.minimum(low + share, tiles)

    q = load_queries(query, block, HEAD)
    softmax = nothing_seen(HEAD, LAUNCH.BLOCK_M)

    if shared.k is not None:
        sees = ((position >= shared_from) & (position < shared_to))[:, None]
        for tile in range(low, tl.minimum(high, shared_tiles)):
            j = tile * LAUNCH.MEMORY_TILE + tl.arange(0, LAUNCH.MEMORY_TILE)
            live = j < shared.tokens
            scales = None
            if shared.FORMAT:
                of_values = tl.load(shared.v_scale + head * shared.tokens + j, mask=live, other=0.0)
                scales = (shared.k_scale, tl.zeros([LAUNCH.MEMORY_TILE], tl.int64) + head * HEAD.SIZE, of_values)
            k, v = shared.k + head * shared.stride_head, shared.v + head * shared.stride_head
            at, visible, bias = j.to(tl.int64) * shared.stride_token, sees & live[None, :], shared.bias * LOG2E
            softmax = attend_tile(q, softmax, k, v, at, live, visible, scales, bias, logits, HEAD, shared.FORMAT)

    if pages.k is not None:
        start, end = tl.maximum(low - shared_tiles, 0), tl.minimum(high, before) - shared_tiles
        softmax = attend_pages(
            q, softmax, start, end, entries, count, block, head, pages, table, logits, HEAD, LAUNCH.MEMORY_TILE
        )

    # Each turn loads the next tile's entries of the block table, so that its keys and values can be on their way.
    table_row = context.block_table + tl.cast(row, tl.int64) * stride_block_table
    ahead = (tl.maximum(low, before) - before) * LAUNCH.TILE + tl.arange(0, LAUNCH.TILE)
    place = tl.load(table_row + ahead // context.BLOCK_SIZE, mask=ahead <= last, other=0)
    for tile in range(tl.maximum(low, before), high):
        j = (tile - before) * LAUNCH.TILE + tl.arange(0, LAUNCH.TILE)
        live = j <= last
        here = place
        place = tl.load(table_row + (j + LAUNCH.TILE) // context.BLOCK_SIZE, mask=j + LAUNCH.TILE <= last, other=0)
        k, v = context.k + head * context.stride_head, context.v + head * context.stride_head
        at = here.to(tl.int64) * context.stride_block + j % context.BLOCK_SIZE * context.stride_token
        visible = j[None, :] <= position[:, None]
        softmax = attend_tile(q, softmax, k, v, at, live, visible, None, None, logits, HEAD, 0)

    finished = True
    if LAUNCH.SPLIT:
        finished, softmax = join_splits(splits, parts, real, softmax, HEAD, LAUNCH.BLOCK_M, LAUNCH.MERGE_STAGES)
    if finished:
        store_outputs(output, softmax, block, stride_lse, HEAD)
