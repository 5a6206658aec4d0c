"""Device functions of the attention kernels. Logits are in base 2 from the scale on; sums and outputs in fp32.

A program holds BLOCK_M rows: query tokens x the query heads that share its KV head. Channels come in two parts, a power
of two and the rest (80 = 64 + 16), as ranges are powers of two and padding would load, multiply and keep zeros.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Block(NamedTuple):
    """The query rows of a program, each [BLOCK_M] but first and last: the first and last position of any."""

    token: Any  # int64
    query_head: Any
    position: Any
    real: Any
    first: Any
    last: Any


class Softmax(NamedTuple):
    """Running over keys: the largest logit and the sum, [BLOCK_M], and the two parts of the weighted values."""

    top: Any
    total: Any
    acc0: Any
    acc1: Any


@triton.jit
def asked(begin, stop, block, slot, TOKENS: tl.constexpr, PART: tl.constexpr):
    """Queries of a row from block ``block`` of it on.

    PART: 1 for rows of one query alone, 2 for others, 3 for rows with memory, 0 for all.
    """
    queries = stop - begin - block * TOKENS
    if PART == 1:
        queries = tl.where(stop - begin == 1, queries, 0)
    if PART == 2:
        queries = tl.where(stop - begin == 1, 0, queries)
    if PART == 3:
        queries = tl.where(slot < 0, 0, queries)
    return queries


@triton.jit
def load_part(base, token, live, PART: tl.constexpr, HEAD, KEYS: tl.constexpr):
    """Part PART of the channels of the tokens at ``base + token``, dead ones 0: [WIDTH, TILE] for keys, else turned."""
    BEGIN: tl.constexpr = HEAD.WIDTH if PART else 0
    WIDTH: tl.constexpr = HEAD.REST if PART else HEAD.WIDTH
    channel = BEGIN + tl.arange(0, WIDTH)
    if KEYS:
        pointers, mask = base + token[None, :] + channel[:, None], live[None, :]
        if BEGIN + WIDTH > HEAD.SIZE:
            mask = mask & (channel < HEAD.SIZE)[:, None]
    else:
        pointers, mask = base + token[:, None] + channel[None, :], live[:, None]
        if BEGIN + WIDTH > HEAD.SIZE:
            mask = mask & (channel < HEAD.SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def load_queries(query, block, HEAD):
    """Both parts of the block's queries; the second is the first where heads have one."""
    row = block.token * query.stride + block.query_head * query.stride_head
    q0 = load_part(query.data, row, block.real, 0, HEAD, False)
    q1 = q0
    if HEAD.REST:
        q1 = load_part(query.data, row, block.real, 1, HEAD, False)
    return q0, q1


@triton.jit
def nothing_seen(HEAD, BLOCK_M: tl.constexpr):
    """The softmax over no keys."""
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, HEAD.WIDTH], tl.float32)
    return Softmax(top, total, acc0, tl.zeros([BLOCK_M, HEAD.REST if HEAD.REST else 1], tl.float32))


@triton.jit
def widen(data, FORMAT: tl.constexpr):
    """8-bit data to fp32. FORMAT: 1 int8, 2 the bits of float8_e4m3fn, which not every GPU can convert."""
    if FORMAT == 2:
        bits = data.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # e4m3 in fp16's fields: exponents are 8 too small
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return data.to(tl.float32)


@triton.jit
def load_keys(base, token, live, scales, dtype: tl.constexpr, PART: tl.constexpr, HEAD, FORMAT: tl.constexpr):
    """Key channels in ``dtype``. scales: if FORMAT, channel scales and where each token's row of them begins."""
    k = load_part(base, token, live, PART, HEAD, True)
    if FORMAT:
        k = widen(k, FORMAT) * load_part(scales[0], scales[1], live, PART, HEAD, True)
    return k.to(dtype)


@triton.jit
def load_values(base, token, live, dtype: tl.constexpr, PART: tl.constexpr, HEAD, FORMAT: tl.constexpr):
    """Value channels in ``dtype``; the scale of 8-bit ones goes on the weights instead."""
    v = load_part(base, token, live, PART, HEAD, False)
    if FORMAT:
        v = widen(v, FORMAT)
    return v.to(dtype)
