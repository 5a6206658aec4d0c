"""Attention of a whole batch over one shared segment: the queries of all rows and the query heads of a KV head are
packed into tiles, so that the segment is read once per tile and KV head and not once per request."""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last, tanh
from mem_triton.ops.memory_attention.cascade.kernel_parts import store_merged
from mem_triton.ops.memory_attention.fused.kernel_output import merge_splits, store_partial
from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, load_part, widen


@triton.jit
def sees_segment(token, query_start_loc, seq_lens, row_slot, first, end, num_rows, search_steps):
    """Which packed tokens see the segment. search_steps: of a binary search among num_rows rows."""
    row = tl.zeros_like(token)
    after = row + num_rows
    for _ in range(search_steps):
        middle = (row + after) // 2
        begun = tl.load(query_start_loc + middle) <= token
        row, after = tl.where(begun, middle, row), tl.where(begun, after, middle)
    stop = tl.load(query_start_loc + row + 1)
    slot = tl.load(row_slot + row)
    known = (token < stop) & (slot >= 0)  # a token behind the last row finds that row, but is past its stop
    position = tl.load(seq_lens + row) - stop + token
    begin = tl.load(first + slot, mask=known, other=0)
    return known & (begin <= position) & (position < tl.load(end + slot, mask=known, other=0))


@triton.jit
def scale_queries(q0, q1, scales, SIZE: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Keys' channel scales put on the queries instead, once and for all keys; and what each row was divided by.

    That keeps a row's largest channel at 1, wherever the scales lie in the range of fp16.
    """
    dtype: tl.constexpr = q0.dtype
    wide0 = q0.to(tl.float32) * tl.load(scales + tl.arange(0, WIDTH))[None, :]
    wide1 = wide0
    largest = tl.max(tl.abs(wide0), 1)
    if REST:
        channel = WIDTH + tl.arange(0, REST)
        wide1 = q1.to(tl.float32) * tl.load(scales + channel, mask=channel < SIZE, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(wide1), 1))
    largest = tl.where(largest > 0, largest, 1.0)
    return (wide0 / largest[:, None]).to(dtype), (wide1 / largest[:, None]).to(dtype), largest


@triton.jit
def load_shared(
    base, token, live, dtype: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    KEYS: tl.constexpr, FORMAT: tl.constexpr, token_scale,
):  # fmt: skip
    x = load_part(base, token, live, BEGIN, WIDTH, SIZE, KEYS)
    if FORMAT:
        x = widen(x, FORMAT)
        if not KEYS:
            x *= token_scale[:, None]
    return x.to(dtype)


@triton.jit(
    do_not_specialize=[
        "num_rows", "search_steps", "length", "split_length", "stride_lse", "stride_lse_head",
    ]
)  # fmt: skip
def shared_kernel(
    query, out, lse, keys, values, key_scale, value_scale, first, end, row_slot, query_start_loc, seq_lens,
    partial, counter, num_rows, search_steps, length, split_length, scale, soft_cap, bias,
    stride_query, stride_query_head, stride_out, stride_out_head, stride_lse, stride_lse_head,
    stride_head, stride_token, stride_key_scale, stride_value_scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BLOCK_M query heads of tokens, KV heads, splits of the segment). Merges into ``out``, ``lse``.

    Blocks come first in the grid: programs that read the same keys run at the same time and meet in the L2 cache.
    partial, counter: as in ``attention_kernel``.
    """
    head = tl.program_id(1).to(tl.int64)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    sees = sees_segment(token, query_start_loc, seq_lens, row_slot, first, end, num_rows, search_steps)
    if tl.max(sees.to(tl.int32), 0) == 0:  # the same in every split, so the counter is not waited for
        return

    token, query_head = token.to(tl.int64), head * GROUP + packed % GROUP
    q_row = token * stride_query + query_head * stride_query_head
    q0 = load_part(query, q_row, sees, 0, WIDTH, SIZE, False)
    q1 = q0
    if REST:
        q1 = load_part(query, q_row, sees, WIDTH, REST, SIZE, False)
    dtype: tl.constexpr = q0.dtype
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if FORMAT:
        q0, q1, largest = scale_queries(q0, q1, key_scale + head * stride_key_scale, SIZE, WIDTH, REST)
        factor *= largest

    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc1 = tl.zeros([BLOCK_M, REST if REST else 1], tl.float32)
    keys, values = keys + head * stride_head, values + head * stride_head
    begin = tl.program_id(2) * split_length
    stop = tl.minimum(begin + split_length, length)
    for start in range(begin, stop, TILE):
        j = start + tl.arange(0, TILE)
        live, at, token_scale = j < stop, j.to(tl.int64) * stride_token, None
        if FORMAT:
            token_scale = tl.load(value_scale + head * stride_value_scale + j, mask=live, other=0.0)
        logits = tl.dot(
            q0, load_shared(keys, at, live, dtype, 0, WIDTH, SIZE, True, FORMAT, None), input_precision="ieee"
        )
        if REST:
            k1 = load_shared(keys, at, live, dtype, WIDTH, REST, SIZE, True, FORMAT, None)
            logits = tl.dot(q1, k1, logits, input_precision="ieee")
        logits *= factor[:, None]
        if SOFT_CAP:
            logits = soft_cap * tanh(logits / soft_cap)
        logits = tl.where(live[None, :], (logits + bias) * LOG2E, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))  # finite: a step has a key, and every row sees all of them
        weight = tl.exp2(logits - highest[:, None])
        shrink = tl.exp2(top - highest)
        top, total = highest, total * shrink + tl.sum(weight, 1)
        weight = weight.to(dtype)
        v0 = load_shared(values, at, live, dtype, 0, WIDTH, SIZE, False, FORMAT, token_scale)
        acc0 = tl.dot(weight, v0, acc0 * shrink[:, None], input_precision="ieee")
        if REST:
            v1 = load_shared(values, at, live, dtype, WIDTH, REST, SIZE, False, FORMAT, token_scale)
            acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")

    if SPLIT:
        real = tl.full([BLOCK_M], 1, tl.int1)  # packed rows nearly all are; telling would take registers
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell = block * tl.num_programs(2)
        store_partial(partial, cell + tl.program_id(2), real, top, total, acc0, acc1, BLOCK_M, WIDTH, REST)
        if not is_last(counter + block, tl.num_programs(2)):
            return
        top, total, acc0, acc1 = merge_splits(
            partial, cell, tl.num_programs(2), real, BLOCK_M, WIDTH, REST, MERGE_STAGES
        )
    store_merged(
        out, lse, token * stride_out + query_head * stride_out_head, token * stride_lse + query_head * stride_lse_head,
        sees, top, total, acc0, acc1, SIZE, WIDTH, REST, True,
    )  # fmt: skip
