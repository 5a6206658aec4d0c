"""The kernel that moves the keys of memory pages. Angles are reduced in fp64, the turn itself is fp32."""

import triton
import triton.language as tl

from mem_triton.ops.reposition.kernel_parts import cos_and_sin


@triton.jit
def reposition_kernel(
    pool,
    positions,
    page,
    source,
    source_page,
    old_positions,
    quarter_turns,
    factor,
    stride_pool_page,
    stride_pool_head,
    stride_pool_token,
    stride_source_page,
    stride_source_head,
    stride_source_token,
    stride_position_page,
    stride_position_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Grid (listed pages, KV heads, groups of TOKENS tokens); a program reads and writes its own tokens only.

    quarter_turns: fp64 [HALF], inv_freq / (pi / 2). PAIRS, REST: powers of two that hold the HALF turning pairs and the
    HEAD_DIM - 2 * HALF channels that stay. Where a listed page is negative, nothing is read or written.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    target = item
    if page is not None:
        target = tl.load(page + item)
    origin = item
    if source_page is not None:
        origin = tl.load(source_page + item)
    if target < 0:
        return
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    there = token < PAGE_SIZE
    read = source + tl.cast(origin, tl.int64) * stride_source_page + head * stride_source_head
    write = pool + tl.cast(target, tl.int64) * stride_pool_page + head * stride_pool_head
    read += token[:, None] * stride_source_token  # [TOKENS, 1]
    write += token[:, None] * stride_pool_token
    dtype = pool.dtype.element_ty

    if HALF > 0:
        place = tl.cast(item, tl.int64) * stride_position_page + head * stride_position_head + token
        position = tl.load(positions + place, mask=there, other=0).to(tl.int64)
        if old_positions is not None:
            position -= tl.load(old_positions + place, mask=there, other=0).to(tl.int64)
        pair = tl.arange(0, PAIRS)
        live = there[:, None] & (pair < HALF)[None, :]
        rate = tl.load(quarter_turns + pair, mask=pair < HALF, other=0.0)
        cos, sin = cos_and_sin(position.to(tl.float64)[:, None] * rate[None, :])  # [TOKENS, PAIRS]
        cos, sin = cos * factor, sin * factor
        first_channel = pair * 2 if INTERLEAVED else pair
        second_channel = first_channel + (1 if INTERLEAVED else HALF)
        first = tl.load(read + first_channel[None, :], mask=live, other=0.0).to(tl.float32)
        second = tl.load(read + second_channel[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(write + first_channel[None, :], (first * cos - second * sin).to(dtype), mask=live)
        tl.store(write + second_channel[None, :], (second * cos + first * sin).to(dtype), mask=live)
    if REST > 0:
        channel = 2 * HALF + tl.arange(0, REST)
        stays = there[:, None] & (channel < HEAD_DIM)[None, :]
        rest = tl.load(read + channel[None, :], mask=stays, other=0.0)
        tl.store(write + channel[None, :], rest.to(tl.float32).to(dtype), mask=stays)
