"""Device functions that walk a slot's memory pages, for the fused kernel and for the one that reads pages alone."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, attend_tile


@triton.jit
def seen_columns(first, end, used, first_position, last_position, COLUMNS: tl.constexpr):
    """The columns of a slot's table from the first to the last page that some position sees: begin, count.

    COLUMNS at a time, as many as are used: a table is as wide as a pool has pages, whatever a row reads of it.
    """
    column = tl.arange(0, COLUMNS)
    begin, stop = used, 0
    for start in range(0, used, COLUMNS):
        at = start + column
        seen = tl.load(first + at, mask=at < used, other=0) <= last_position
        seen = seen & (tl.load(end + at, mask=at < used, other=0) > first_position) & (at < used)
        begin = tl.minimum(begin, tl.min(tl.where(seen, at, used), 0))
        stop = tl.maximum(stop, tl.max(tl.where(seen, at + 1, 0), 0))
    return begin, tl.maximum(stop - begin, 0)


@triton.jit
def find_page_tokens(
    tile,
    entries,
    pages,
    page,
    tokens,
    first,
    end,
    first_position,
    last_position,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where tile ``tile`` of ``pages`` table entries lies: page number, seen_from, seen_to and whether it counts.

    All [TILE]. A token counts if its page holds it and some position of the block sees the page.
    """
    j = tile * TILE + tl.arange(0, TILE)
    entry, listed = entries + j // PAGE_SIZE, j // PAGE_SIZE < pages
    seen_from = tl.load(first + entry, mask=listed, other=0)
    seen_to = tl.load(end + entry, mask=listed, other=0)
    filled = tl.load(tokens + entry, mask=listed, other=0)
    place = tl.load(page + entry, mask=listed, other=0)
    live = (seen_from <= last_position) & (seen_to > first_position) & (j % PAGE_SIZE < filled)
    return place, seen_from, seen_to, live


@triton.jit
def attend_pages(
    q0,
    q1,
    top,
    total,
    acc0,
    acc1,
    low,
    high,
    entries,
    pages,
    position,
    first_position,
    last_position,
    head,
    keys,
    values,
    key_scale,
    value_scale,
    page,
    tokens,
    first,
    end,
    bias,
    stride_page,
    stride_head,
    stride_token,
    scale,
    soft_cap,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fold tiles ``low`` to ``high`` of a slot's pages into the running softmax; returns top, total, acc0, acc1.

    entries: of the first page in the table's columns page, tokens, first, end, bias. Each turn looks the next tile up,
    so that its keys and values can be on their way; but for 8-bit pages, which have no registers left for that.
    """
    if not FORMAT:
        next_place, next_from, next_to, next_live = find_page_tokens(
            low, entries, pages, page, tokens, first, end, first_position, last_position, PAGE_SIZE, TILE
        )
    STAGES: tl.constexpr = 1 if FORMAT else None
    for tile in tl.range(low, high, num_stages=STAGES):
        if FORMAT:
            place, seen_from, seen_to, live = find_page_tokens(
                tile, entries, pages, page, tokens, first, end, first_position, last_position, PAGE_SIZE, TILE
            )
        else:
            place, seen_from, seen_to, live = next_place, next_from, next_to, next_live
            next_place, next_from, next_to, next_live = find_page_tokens(
                tile + 1, entries, pages, page, tokens, first, end, first_position, last_position, PAGE_SIZE, TILE
            )
        place = place.to(tl.int64)
        j = tile * TILE + tl.arange(0, TILE)
        page_head = place * tl.num_programs(1) + head  # row of the scales
        token_scale, token_bias = None, None
        if FORMAT:
            token_scale = tl.load(value_scale + page_head * PAGE_SIZE + j % PAGE_SIZE, mask=live, other=0.0)
        if bias is not None:
            token_bias = (tl.load(bias + entries + j // PAGE_SIZE, mask=live, other=0.0) * LOG2E)[None, :]
        visible = (position[:, None] >= seen_from[None, :]) & (position[:, None] < seen_to[None, :])
        top, total, acc0, acc1 = attend_tile(
            q0,
            q1,
            top,
            total,
            acc0,
            acc1,
            keys + head * stride_head,
            values + head * stride_head,
            place * stride_page + j % PAGE_SIZE * stride_token,
            live,
            visible & live[None, :],
            key_scale,
            page_head * SIZE,
            token_scale,
            token_bias,
            scale,
            soft_cap,
            SIZE,
            WIDTH,
            REST,
            FORMAT,
            SOFT_CAP,
        )
    return top, total, acc0, acc1
