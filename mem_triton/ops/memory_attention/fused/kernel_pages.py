"""Device functions that loop over a slot's memory pages, for the fused kernel and the one that reads pages alone."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E
from mem_triton.ops.memory_attention.fused.kernel_tiles import attend_tile


@triton.jit
def seen_columns(table, entries, used, block, COLUMNS: tl.constexpr):
    """The columns of a slot's table from the first to the last page that some position sees: begin, count.

    entries: where the slot's row begins. COLUMNS at a time, as many as are used: a table is as wide as a pool has
    pages, whatever a row reads of it.
    """
    first, end = table.first + entries, table.end + entries
    column = tl.arange(0, COLUMNS)
    begin, stop = used, 0
    for start in range(0, used, COLUMNS):
        at = start + column
        seen = tl.load(first + at, mask=at < used, other=0) <= block.last
        seen = seen & (tl.load(end + at, mask=at < used, other=0) > block.first) & (at < used)
        begin = tl.minimum(begin, tl.min(tl.where(seen, at, used), 0))
        stop = tl.maximum(stop, tl.max(tl.where(seen, at + 1, 0), 0))
    return begin, tl.maximum(stop - begin, 0)


@triton.jit
def find_page_tokens(tile, table, entries, count, block, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where tile ``tile`` of ``count`` table entries lies: page number, seen_from, seen_to and whether it counts.

    All [TILE]. A token counts if its page holds it and some position of the block sees the page.
    """
    j = tile * TILE + tl.arange(0, TILE)
    entry, listed = entries + j // PAGE_SIZE, j // PAGE_SIZE < count
    seen_from = tl.load(table.first + entry, mask=listed, other=0)
    seen_to = tl.load(table.end + entry, mask=listed, other=0)
    filled = tl.load(table.tokens + entry, mask=listed, other=0)
    place = tl.load(table.page + entry, mask=listed, other=0)
    live = (seen_from <= block.last) & (seen_to > block.first) & (j % PAGE_SIZE < filled)
    return place, seen_from, seen_to, live


@triton.jit
def attend_pages(q, softmax, low, high, entries, count, block, head, pages, table, logits, HEAD, TILE: tl.constexpr):
    """The running softmax with tiles ``low`` to ``high`` of a slot's pages in it.

    entries, count: of the pages in the table's columns. Each turn looks the next tile up, so that its keys and values
    can be on their way; but for 8-bit pages, which have no registers left for that.
    """
    FORMAT: tl.constexpr = pages.FORMAT
    SIZE: tl.constexpr = pages.PAGE_SIZE
    if not FORMAT:
        ahead = find_page_tokens(low, table, entries, count, block, SIZE, TILE)
    STAGES: tl.constexpr = 1 if FORMAT else None
    for tile in tl.range(low, high, num_stages=STAGES):
        if FORMAT:
            place, seen_from, seen_to, live = find_page_tokens(tile, table, entries, count, block, SIZE, TILE)
        else:
            place, seen_from, seen_to, live = ahead
            ahead = find_page_tokens(tile + 1, table, entries, count, block, SIZE, TILE)
        place = place.to(tl.int64)
        j = tile * TILE + tl.arange(0, TILE)
        page_head = place * tl.num_programs(1) + head  # row of the scales
        scales, bias = None, None
        if FORMAT:
            of_values = tl.load(pages.v_scale + page_head * SIZE + j % SIZE, mask=live, other=0.0)
            scales = (pages.k_scale, page_head * HEAD.SIZE, of_values)
        if table.bias is not None:
            bias = (tl.load(table.bias + entries + j // SIZE, mask=live, other=0.0) * LOG2E)[None, :]
        visible = (block.position[:, None] >= seen_from[None, :]) & (block.position[:, None] < seen_to[None, :])
        token = place * pages.stride_page + j % SIZE * pages.stride_token
        k, v = pages.k + head * pages.stride_head, pages.v + head * pages.stride_head
        visible = visible & live[None, :]
        softmax = attend_tile(q, softmax, k, v, token, live, visible, scales, bias, logits, HEAD, FORMAT)
    return softmax
