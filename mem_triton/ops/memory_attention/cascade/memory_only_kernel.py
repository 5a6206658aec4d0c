"""Attention over the memory pages of each row and nothing else, for batches whose context another backend does."""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last
from mem_triton.ops.memory_attention.cascade.kernel_parts import store_merged
from mem_triton.ops.memory_attention.fused.kernel_output import merge_splits, store_partial
from mem_triton.ops.memory_attention.fused.kernel_pages import attend_pages
from mem_triton.ops.memory_attention.fused.kernel_parts import find_row, load_part


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "split_pages", "stride_lse", "stride_lse_head"])
def memory_only_kernel(
    query, out, lse, page_keys, page_values, page_key_scale, page_value_scale,
    table_page, table_tokens, table_first, table_end, table_count, table_bias, row_slot, query_start_loc, seq_lens,
    partial, counter, num_tokens, num_rows, split_pages, scale, soft_cap,
    stride_query, stride_query_head, stride_out, stride_out_head, stride_lse, stride_lse_head,
    stride_page, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    MERGE: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, KV heads, splits of split_pages table columns each).

    MERGE: into the softmax in ``out`` and ``lse``; rows that see no page keep their bits. Otherwise every token gets a
    result, also those behind the last row: 0 and -inf if it sees nothing.
    partial, counter: as in ``attention_kernel``.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # query tokens of a block
    head = tl.program_id(1).to(tl.int64)
    row, block = find_row(query_start_loc, num_rows + 1, tl.program_id(0), TOKENS)  # one more row: the padding
    real_row = row < num_rows
    begin = tl.load(query_start_loc + row)
    stop = tl.load(query_start_loc + row + 1, mask=real_row, other=0)
    stop = tl.where(real_row, stop, num_tokens)
    queries = stop - begin - block * TOKENS
    if queries <= 0:
        return
    slot = tl.load(row_slot + row, mask=real_row, other=-1)
    pages = tl.load(table_count + slot, mask=slot >= 0, other=0)
    splits = tl.cdiv(pages, split_pages)  # those that have something to do
    if tl.program_id(2) >= tl.maximum(splits, 0 if MERGE else 1):  # else zeros must be written
        return

    m = tl.arange(0, BLOCK_M)
    first_position = tl.load(seq_lens + row, mask=real_row, other=0) - queries
    position = first_position + m // GROUP
    last_position = first_position + tl.minimum(queries, TOKENS) - 1
    real = (m // GROUP < queries) & (m < TOKENS * GROUP)
    token, query_head = (begin + block * TOKENS + m // GROUP).to(tl.int64), head * GROUP + m % GROUP

    q_row = token * stride_query + query_head * stride_query_head
    q0 = load_part(query, q_row, real, 0, WIDTH, SIZE, False)
    q1 = q0
    if REST:
        q1 = load_part(query, q_row, real, WIDTH, REST, SIZE, False)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc1 = tl.zeros([BLOCK_M, REST if REST else 1], tl.float32)

    low = tl.program_id(2) * split_pages
    pages = tl.minimum(low + split_pages, pages) - low  # of this split; none if the slot has none
    top, total, acc0, acc1 = attend_pages(
        q0, q1, top, total, acc0, acc1, 0, tl.cdiv(pages * PAGE_SIZE, TILE), slot.to(tl.int64) * stride_table + low,
        pages, position, first_position, last_position, head, page_keys, page_values, page_key_scale, page_value_scale,
        table_page, table_tokens, table_first, table_end, table_bias, stride_page, stride_head, stride_token,
        scale, soft_cap, SIZE, WIDTH, REST, PAGE_SIZE, FORMAT, SOFT_CAP, TILE,
    )  # fmt: skip

    finished = splits <= 1
    if SPLIT:  # noqa: SIM102 (one is known when compiling, the other is not)
        if splits > 1:
            group = tl.program_id(0) * tl.num_programs(1) + head
            cell = group * tl.num_programs(2)
            store_partial(partial, cell + tl.program_id(2), real, top, total, acc0, acc1, BLOCK_M, WIDTH, REST)
            finished = is_last(counter + group, splits)
            if finished:
                top, total, acc0, acc1 = merge_splits(partial, cell, splits, real, BLOCK_M, WIDTH, REST, MERGE_STAGES)
    if finished:
        store_merged(
            out, lse, token * stride_out + query_head * stride_out_head,
            token * stride_lse + query_head * stride_lse_head, real, top, total, acc0, acc1, SIZE, WIDTH, REST, MERGE,
        )  # fmt: skip
