"""Attention to the memory pages of each row and nothing else, for batches whose context another backend does."""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import find_block
from mem_triton.ops.memory_attention.cascade.kernel_parts import store_merged
from mem_triton.ops.memory_attention.fused.kernel_output import join_splits
from mem_triton.ops.memory_attention.fused.kernel_pages import attend_pages
from mem_triton.ops.memory_attention.fused.kernel_parts import Block, load_queries, nothing_seen


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "split_pages", "stride_lse", "stride_lse_head"])
def memory_only_kernel(
    query,
    output,
    pages,
    table,
    splits,
    logits,
    num_tokens,
    num_rows,
    split_pages,
    stride_lse,
    stride_lse_head,
    HEAD,
    LAUNCH,
    MERGE: tl.constexpr,
):
    """Grid (query blocks, KV heads, splits of split_pages table columns each).

    MERGE: into the softmax in ``output``; rows that see no page keep their bits. Otherwise every token gets a result,
    also those behind the last row: 0 and -inf if it sees nothing. Arguments: see ``operands``; LAUNCH:
    ``launch.CascadeLaunch``.
    """
    TOKENS: tl.constexpr = LAUNCH.BLOCK_M // HEAD.GROUP  # query tokens of a block
    head = tl.program_id(1).to(tl.int64)
    row, number = find_block(query.start_loc, num_rows + 1, tl.program_id(0), TOKENS)  # one more row: the padding
    real_row = row < num_rows
    begin = tl.load(query.start_loc + row)
    stop = tl.load(query.start_loc + row + 1, mask=real_row, other=0)
    stop = tl.where(real_row, stop, num_tokens)
    queries = stop - begin - number * TOKENS
    if queries <= 0:
        return
    slot = tl.load(query.slot + row, mask=real_row, other=-1)
    count = tl.load(table.used + slot, mask=slot >= 0, other=0)
    parts = tl.cdiv(count, split_pages)  # those that have something to do
    if tl.program_id(2) >= tl.maximum(parts, 0 if MERGE else 1):  # else zeros must be written
        return

    m = tl.arange(0, LAUNCH.BLOCK_M)
    first = tl.load(query.seq_lens + row, mask=real_row, other=0) - queries
    position = first + m // HEAD.GROUP
    last = first + tl.minimum(queries, TOKENS) - 1
    real = (m // HEAD.GROUP < queries) & (m < TOKENS * HEAD.GROUP)
    token = (begin + number * TOKENS + m // HEAD.GROUP).to(tl.int64)
    block = Block(token, head * HEAD.GROUP + m % HEAD.GROUP, position, real, first, last)
    q = load_queries(query, block, HEAD)
    softmax = nothing_seen(HEAD, LAUNCH.BLOCK_M)

    low = tl.program_id(2) * split_pages
    count = tl.minimum(low + split_pages, count) - low  # of this split; none if the slot has none
    tiles, entries = tl.cdiv(count * pages.PAGE_SIZE, LAUNCH.TILE), slot.to(tl.int64) * table.stride + low
    softmax = attend_pages(q, softmax, 0, tiles, entries, count, block, head, pages, table, logits, HEAD, LAUNCH.TILE)

    finished = True
    if LAUNCH.SPLIT:
        finished, softmax = join_splits(splits, parts, real, softmax, HEAD, LAUNCH.BLOCK_M, LAUNCH.MERGE_STAGES)
    if finished:
        at = token * output.stride + block.query_head * output.stride_head
        lse_at = token * stride_lse + block.query_head * stride_lse_head
        store_merged(output, at, lse_at, real, softmax, HEAD, MERGE)
