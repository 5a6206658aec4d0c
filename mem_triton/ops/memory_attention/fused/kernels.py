"""The fused kernel of memory attention: one softmax over [shared segment | memory pages | context] in one launch.

A program takes one block of a row's queries, one KV head and one split of the tiles that these queries may see,
memory's first. The tiles are dealt out by the row's own lengths, so a row without memory is computed as if nobody had
any. The last split to finish merges all of them.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last
from mem_triton.ops.memory_attention.fused.kernel_output import merge_splits, store_outputs, store_partial
from mem_triton.ops.memory_attention.fused.kernel_pages import attend_pages, seen_columns
from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, asked, attend_tile, find_row, load_part


@triton.jit(do_not_specialize=["num_rows", "stride_block_table"])  # no new variant for another batch while serving
def attention_kernel(
    query, out, lse, keys, values, block_table, query_start_loc, seq_lens, row_slot,
    page_keys, page_values, page_key_scale, page_value_scale,
    table_page, table_tokens, table_first, table_end, table_count, table_bias,
    shared_keys, shared_values, shared_key_scale, shared_value_scale, shared_first, shared_end,
    sinks, partial, counter, num_rows, scale, soft_cap, shared_bias, shared_tokens,
    stride_query, stride_query_head, stride_out, stride_out_head, stride_lse,
    stride_block, stride_head, stride_token, stride_block_table,
    stride_page, stride_page_head, stride_page_token, stride_table, stride_shared_head, stride_shared_token,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, MEMORY_TILE: tl.constexpr,
    ONE_BLOCK: tl.constexpr, SPLIT: tl.constexpr, MIN_TILES: tl.constexpr, PART: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, KV heads, splits). ONE_BLOCK: block n holds all of row n; PART: see ``asked``.

    partial: fp32 [blocks * heads * splits, BLOCK_M, WIDTH + REST + 4]; counter: int32 [blocks * heads], left 0.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # query tokens of a block
    row, block, head = tl.program_id(0), 0, tl.program_id(1).to(tl.int64)
    if not ONE_BLOCK:
        row, block = find_row(query_start_loc, num_rows, row, TOKENS)
    begin, stop = tl.load(query_start_loc + row), tl.load(query_start_loc + row + 1)
    slot = -1
    if row_slot is not None:
        slot = tl.load(row_slot + row)
    queries = asked(begin, stop, block, slot, TOKENS, PART)
    if queries <= 0:
        return
    m = tl.arange(0, BLOCK_M)
    first_position = tl.load(seq_lens + row) - queries
    position = first_position + m // GROUP
    last_position = first_position + tl.minimum(queries, TOKENS) - 1
    real = (m // GROUP < queries) & (m < TOKENS * GROUP)
    token, query_head = (begin + block * TOKENS + m // GROUP).to(tl.int64), head * GROUP + m % GROUP

    shared_tiles, page_tiles = 0, 0
    if shared_keys is not None:
        shared_from, shared_to = tl.load(shared_first + tl.maximum(slot, 0)), tl.load(shared_end + tl.maximum(slot, 0))
        sees_any = (slot >= 0) & (shared_from <= last_position) & (shared_to > first_position)
        shared_tiles = tl.where(sees_any, tl.cdiv(shared_tokens, MEMORY_TILE), 0)
    if page_keys is not None:
        entries = tl.maximum(slot, 0).to(tl.int64) * stride_table
        used = tl.where(slot >= 0, tl.load(table_count + tl.maximum(slot, 0)), 0)
        column, page_count = seen_columns(
            table_first + entries, table_end + entries, used, first_position, last_position, COLUMNS
        )  # fmt: skip
        entries += column
        page_tiles = tl.cdiv(page_count * PAGE_SIZE, MEMORY_TILE)
    before = shared_tiles + page_tiles
    tiles = before + tl.cdiv(last_position + 1, TILE)
    low, high, splits = 0, tiles, 1
    if SPLIT:
        share = tl.maximum(tl.cdiv(tiles, tl.num_programs(2)), MIN_TILES)
        splits = tl.cdiv(tiles, share)
        if tl.program_id(2) >= splits:
            return
        low = tl.program_id(2) * share
        high = tl.minimum(low + share, tiles)

    q_row = token * stride_query + query_head * stride_query_head
    q0 = load_part(query, q_row, real, 0, WIDTH, SIZE, False)
    q1 = q0
    if REST:
        q1 = load_part(query, q_row, real, WIDTH, REST, SIZE, False)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc1 = tl.zeros([BLOCK_M, REST if REST else 1], tl.float32)

    if shared_keys is not None:
        sees = ((position >= shared_from) & (position < shared_to))[:, None]
        for tile in range(low, tl.minimum(high, shared_tiles)):
            j = tile * MEMORY_TILE + tl.arange(0, MEMORY_TILE)
            live = j < shared_tokens
            value_scale = None
            if SHARED_FORMAT:
                value_scale = tl.load(shared_value_scale + head * shared_tokens + j, mask=live, other=0.0)
            top, total, acc0, acc1 = attend_tile(
                q0, q1, top, total, acc0, acc1, shared_keys + head * stride_shared_head,
                shared_values + head * stride_shared_head, j.to(tl.int64) * stride_shared_token, live,
                sees & live[None, :], shared_key_scale, tl.zeros([MEMORY_TILE], tl.int64) + head * SIZE, value_scale,
                shared_bias * LOG2E, scale, soft_cap, SIZE, WIDTH, REST, SHARED_FORMAT, SOFT_CAP,
            )  # fmt: skip

    if page_keys is not None:
        top, total, acc0, acc1 = attend_pages(
            q0, q1, top, total, acc0, acc1, tl.maximum(low - shared_tiles, 0), tl.minimum(high, before) - shared_tiles,
            entries, page_count, position, first_position, last_position, head,
            page_keys, page_values, page_key_scale, page_value_scale,
            table_page, table_tokens, table_first, table_end, table_bias,
            stride_page, stride_page_head, stride_page_token, scale, soft_cap,
            SIZE, WIDTH, REST, PAGE_SIZE, FORMAT, SOFT_CAP, MEMORY_TILE,
        )  # fmt: skip

    # Each turn loads the next tile's entries of the block table, so that its keys and values can be on their way.
    table_row = block_table + tl.cast(row, tl.int64) * stride_block_table
    ahead = (tl.maximum(low, before) - before) * TILE + tl.arange(0, TILE)
    place = tl.load(table_row + ahead // BLOCK_SIZE, mask=ahead <= last_position, other=0)
    for tile in range(tl.maximum(low, before), high):
        j = (tile - before) * TILE + tl.arange(0, TILE)
        live = j <= last_position
        here = place
        place = tl.load(table_row + (j + TILE) // BLOCK_SIZE, mask=j + TILE <= last_position, other=0)
        top, total, acc0, acc1 = attend_tile(
            q0, q1, top, total, acc0, acc1, keys + head * stride_head, values + head * stride_head,
            here.to(tl.int64) * stride_block + j % BLOCK_SIZE * stride_token, live, j[None, :] <= position[:, None],
            None, None, None, None, scale, soft_cap, SIZE, WIDTH, REST, 0, SOFT_CAP,
        )  # fmt: skip

    finished = splits == 1
    if SPLIT:  # noqa: SIM102 (one is known when compiling, the other is not)
        if splits > 1:
            group = tl.program_id(0) * tl.num_programs(1) + head
            cell = group * tl.num_programs(2)
            store_partial(partial, cell + tl.program_id(2), real, top, total, acc0, acc1, BLOCK_M, WIDTH, REST)
            finished = is_last(counter + group, splits)
            if finished:
                top, total, acc0, acc1 = merge_splits(partial, cell, splits, real, BLOCK_M, WIDTH, REST, MERGE_STAGES)
    if finished:
        store_outputs(
            out, lse, sinks, top, total, acc0, acc1, token * stride_out + query_head * stride_out_head,
            token * stride_lse + query_head, query_head, real, SIZE, WIDTH, REST,
        )  # fmt: skip
