"""Device functions of the attention kernels. Logits are in base 2 from the scale on; sums and outputs in fp32.

A program holds BLOCK_M rows: query tokens x the query heads that share its KV head. Channels come in two parts, a power
of two and the rest (80 = 64 + 16), as ranges are powers of two and padding would load, multiply and keep zeros.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_row(query_start_loc, num_rows, block, TOKENS: tl.constexpr):
    """Row of query block ``block`` and its number in it. Row n owns blocks from start[n] // TOKENS + n on: enough."""
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(query_start_loc + middle) // TOKENS + middle <= block
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    return low, block - (tl.load(query_start_loc + low) // TOKENS + low)


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
def load_part(base, token, live, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Channels BEGIN ... of the tokens at ``base + token``, dead ones 0: [WIDTH, TILE] for keys, else [TILE, WIDTH]."""
    channel = BEGIN + tl.arange(0, WIDTH)
    if KEYS:
        pointers, mask = base + token[None, :] + channel[:, None], live[None, :]
        if BEGIN + WIDTH > SIZE:
            mask = mask & (channel < SIZE)[:, None]
    else:
        pointers, mask = base + token[:, None] + channel[None, :], live[:, None]
        if BEGIN + WIDTH > SIZE:
            mask = mask & (channel < SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def widen(data, FORMAT: tl.constexpr):
    """8-bit data to fp32. FORMAT: 1 int8, 2 the bits of float8_e4m3fn, which not every GPU can convert."""
    if FORMAT == 2:
        bits = data.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # e4m3 in fp16's fields: exponents are 8 too small
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return data.to(tl.float32)


@triton.jit
def load_keys(
    base, token, live, scales, scale_row, dtype: tl.constexpr,
    BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Key channels [WIDTH, TILE] in ``dtype``. scales + scale_row: each token's row of channel scales, if FORMAT."""
    k = load_part(base, token, live, BEGIN, WIDTH, SIZE, True)
    if FORMAT:
        k = widen(k, FORMAT) * load_part(scales, scale_row, live, BEGIN, WIDTH, SIZE, True)
    return k.to(dtype)


@triton.jit
def load_values(
    base, token, live, dtype: tl.constexpr,
    BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Value channels [TILE, WIDTH] in ``dtype``; the scale of 8-bit ones goes on the weights instead."""
    v = load_part(base, token, live, BEGIN, WIDTH, SIZE, False)
    if FORMAT:
        v = widen(v, FORMAT)
    return v.to(dtype)


@triton.jit
def attend_tile(
    q0, q1, top, total, acc0, acc1, keys, values, token, live, visible, key_scale, scale_row, value_scale, bias,
    scale, soft_cap, SIZE: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Fold a tile of keys and values into the running softmax; returns its new top, total, acc0, acc1.

    token: int64 [TILE], where each token's channels begin. visible: [BLOCK_M, TILE] or broadcastable.
    value_scale: [TILE] or None; bias: [TILE], a scalar or None, in base 2.
    """
    dtype: tl.constexpr = q0.dtype
    k0 = load_keys(keys, token, live, key_scale, scale_row, dtype, 0, WIDTH, SIZE, FORMAT)
    logits = tl.dot(q0, k0, input_precision="ieee")
    if REST:
        k1 = load_keys(keys, token, live, key_scale, scale_row, dtype, WIDTH, REST, SIZE, FORMAT)
        logits = tl.dot(q1, k1, logits, input_precision="ieee")
    if SOFT_CAP:
        x = logits * (scale / soft_cap)
        e = tl.exp(-2.0 * tl.abs(x))
        tanh = (1.0 - e) / (1.0 + e)
        logits = tl.where(x < 0, -tanh, tanh) * (soft_cap * LOG2E)
    else:
        logits = logits * (scale * LOG2E)
    if bias is not None:
        logits += bias
    logits = tl.where(visible, logits, float("-inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weight = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    if value_scale is not None:
        weight *= value_scale[None, :]
    weight = weight.to(dtype)
    v0 = load_values(values, token, live, dtype, 0, WIDTH, SIZE, FORMAT)
    acc0 = tl.dot(weight, v0, acc0 * shrink[:, None], input_precision="ieee")
    if REST:
        v1 = load_values(values, token, live, dtype, WIDTH, REST, SIZE, FORMAT)
        acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")
    return highest, total, acc0, acc1
