"""Attention of a whole batch over one shared segment: the queries of all rows and the query heads of a KV head are
packed into tiles, so that the segment is read once per tile and KV head and not once per request."""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last, tanh
from mem_triton.ops.memory_attention.cascade.kernel_parts import store_merged
from mem_triton.ops.memory_attention.fused.kernel_output import merge_splits, store_partial
from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, Softmax, load_part, nothing_seen, widen


@triton.jit
def sees_segment(token, query, shared, num_rows, search_steps):
    """Which packed tokens see the segment. search_steps: of a binary search among num_rows rows."""
    row = tl.zeros_like(token)
    after = row + num_rows
    for _ in range(search_steps):
        middle = (row + after) // 2
        begun = tl.load(query.start_loc + middle) <= token
        row, after = tl.where(begun, middle, row), tl.where(begun, after, middle)
    stop = tl.load(query.start_loc + row + 1)
    slot = tl.load(query.slot + row)
    known = (token < stop) & (slot >= 0)  # a token behind the last row finds that row, but is past its stop
    position = tl.load(query.seq_lens + row) - stop + token
    begin = tl.load(shared.first + slot, mask=known, other=0)
    return known & (begin <= position) & (position < tl.load(shared.end + slot, mask=known, other=0))


@triton.jit
def scale_queries(q0, q1, scales, HEAD):
    """Keys' channel scales put on the queries instead, once and for all keys; and what each row was divided by.

    That keeps a row's largest channel at 1, wherever the scales lie in the range of fp16.
    """
    dtype: tl.constexpr = q0.dtype
    wide0 = q0.to(tl.float32) * tl.load(scales + tl.arange(0, HEAD.WIDTH))[None, :]
    wide1 = wide0
    largest = tl.max(tl.abs(wide0), 1)
    if HEAD.REST:
        channel = HEAD.WIDTH + tl.arange(0, HEAD.REST)
        wide1 = q1.to(tl.float32) * tl.load(scales + channel, mask=channel < HEAD.SIZE, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(wide1), 1))
    largest = tl.where(largest > 0, largest, 1.0)
    return (wide0 / largest[:, None]).to(dtype), (wide1 / largest[:, None]).to(dtype), largest


@triton.jit
def load_shared(base, at, live, dtype: tl.constexpr, PART: tl.constexpr, HEAD, KEYS: tl.constexpr, FORMAT, scale):
    """Part PART of the channels of a tile in ``dtype``. scale: if FORMAT, of each token's values."""
    x = load_part(base, at, live, PART, HEAD, KEYS)
    if FORMAT:
        x = widen(x, FORMAT)
        if not KEYS:
            x *= scale[:, None]
    return x.to(dtype)


@triton.jit(do_not_specialize=["num_rows", "search_steps", "length", "split_length", "stride_lse", "stride_lse_head"])
def shared_kernel(
    query,
    output,
    shared,
    splits,
    logits,
    num_rows,
    search_steps,
    length,
    split_length,
    stride_lse,
    stride_lse_head,
    stride_k_scale,
    stride_v_scale,
    HEAD,
    LAUNCH,
):
    """Grid (blocks of BLOCK_M query heads of tokens, KV heads, splits of the segment). Merges into ``output``.

    Blocks come first in the grid: programs that read the same keys run at the same time and meet in the L2 cache.
    Arguments: see ``operands``; LAUNCH: ``launch.CascadeLaunch``.
    """
    BLOCK_M: tl.constexpr = LAUNCH.BLOCK_M
    FORMAT: tl.constexpr = shared.FORMAT
    head = tl.program_id(1).to(tl.int64)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = packed // HEAD.GROUP
    sees = sees_segment(token, query, shared, num_rows, search_steps)
    if tl.max(sees.to(tl.int32), 0) == 0:  # the same in every split, so the counter is not waited for
        return

    token, query_head = token.to(tl.int64), head * HEAD.GROUP + packed % HEAD.GROUP
    q_row = token * query.stride + query_head * query.stride_head
    q0 = load_part(query.data, q_row, sees, 0, HEAD, False)
    q1 = q0
    if HEAD.REST:
        q1 = load_part(query.data, q_row, sees, 1, HEAD, False)
    dtype: tl.constexpr = q0.dtype
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * logits.scale
    if FORMAT:
        q0, q1, largest = scale_queries(q0, q1, shared.k_scale + head * stride_k_scale, HEAD)
        factor *= largest

    softmax = nothing_seen(HEAD, BLOCK_M)
    k, v = shared.k + head * shared.stride_head, shared.v + head * shared.stride_head
    begin = tl.program_id(2) * split_length
    stop = tl.minimum(begin + split_length, length)
    for start in range(begin, stop, LAUNCH.TILE):
        j = start + tl.arange(0, LAUNCH.TILE)
        live, at, scale = j < stop, j.to(tl.int64) * shared.stride_token, None
        if FORMAT:
            scale = tl.load(shared.v_scale + head * stride_v_scale + j, mask=live, other=0.0)
        x = tl.dot(q0, load_shared(k, at, live, dtype, 0, HEAD, True, FORMAT, None), input_precision="ieee")
        if HEAD.REST:
            x = tl.dot(q1, load_shared(k, at, live, dtype, 1, HEAD, True, FORMAT, None), x, input_precision="ieee")
        x *= factor[:, None]
        if logits.soft_cap is not None:
            x = logits.soft_cap * tanh(x / logits.soft_cap)
        x = tl.where(live[None, :], (x + shared.bias) * LOG2E, float("-inf"))
        highest = tl.maximum(softmax.top, tl.max(x, 1))  # finite: a step has a key, and every row sees all of them
        weight = tl.exp2(x - highest[:, None])
        shrink = tl.exp2(softmax.top - highest)
        total = softmax.total * shrink + tl.sum(weight, 1)
        weight = weight.to(dtype)
        part = load_shared(v, at, live, dtype, 0, HEAD, False, FORMAT, scale)
        acc0, acc1 = tl.dot(weight, part, softmax.acc0 * shrink[:, None], input_precision="ieee"), softmax.acc1
        if HEAD.REST:
            part = load_shared(v, at, live, dtype, 1, HEAD, False, FORMAT, scale)
            acc1 = tl.dot(weight, part, acc1 * shrink[:, None], input_precision="ieee")
        softmax = Softmax(highest, total, acc0, acc1)

    if LAUNCH.SPLIT:
        real = tl.full([BLOCK_M], 1, tl.int1)  # packed rows nearly all are; telling would take registers
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell, parts = block * tl.num_programs(2), tl.num_programs(2)
        store_partial(splits.partial, cell + tl.program_id(2), real, softmax, HEAD, BLOCK_M)
        if not is_last(splits.counter + block, parts):
            return
        softmax = merge_splits(splits.partial, cell, parts, real, HEAD, BLOCK_M, LAUNCH.MERGE_STAGES)
    out_at = token * output.stride + query_head * output.stride_head
    lse_at = token * stride_lse + query_head * stride_lse_head
    store_merged(output, out_at, lse_at, sees, softmax, HEAD, True)
