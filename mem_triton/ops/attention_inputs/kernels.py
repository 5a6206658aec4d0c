"""The kernel between a layer's fused projection and its attention: δ-mem's step, its corrections, q/k norm and RoPE.

A program takes one head of one token. Decode (STEP): every program of a row reads the row's old state and computes the
same few reads from it, which costs less than a launch; the last one to do so writes the new state.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last
from mem_triton.ops.delta_rule.kernel_parts import activate, cell_of, load_bias, load_start, load_token


@triton.jit
def treat_head(
    head, delta, norm, cos_sin, read, live, eps, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head in place: PAIRS pairs of channels, maybe rotated, and a rest. delta, norm, cos_sin: None = none."""
    i, row = tl.arange(0, PAIR_BLOCK), tl.arange(0, ROWS)
    real = i < PAIRS
    low, high = (2 * i, 2 * i + 1) if INTERLEAVED else (i, i + PAIRS)
    a = tl.load(head + low, mask=real, other=0.0).to(tl.float32)
    b = tl.load(head + high, mask=real, other=0.0).to(tl.float32)
    rest = 2 * PAIRS + tl.arange(0, REST_BLOCK if REST_BLOCK else 1)
    last = rest < HEAD_DIM
    c = tl.load(head + rest, mask=last, other=0.0).to(tl.float32)
    if delta is not None:
        mask, value = real[:, None] & live[None, :], read[None, :]
        w = tl.load(delta + low[:, None] * WIDTH + row[None, :], mask=mask, other=0.0)
        a += tl.sum(w.to(tl.float32) * value, 1)
        w = tl.load(delta + high[:, None] * WIDTH + row[None, :], mask=mask, other=0.0)
        b += tl.sum(w.to(tl.float32) * value, 1)
        if REST_BLOCK:
            w = tl.load(delta + rest[:, None] * WIDTH + row[None, :], mask=last[:, None] & live[None, :], other=0.0)
            c += tl.sum(w.to(tl.float32) * value, 1)
    if norm is not None:
        square = tl.sum(a * a) + tl.sum(b * b) + tl.sum(c * c)
        scale = 1.0 / tl.sqrt(square / HEAD_DIM + eps)
        a *= scale * tl.load(norm + low, mask=real, other=0.0).to(tl.float32)
        b *= scale * tl.load(norm + high, mask=real, other=0.0).to(tl.float32)
        c *= scale * tl.load(norm + rest, mask=last, other=0.0).to(tl.float32)
    if cos_sin is not None:
        cos = tl.load(cos_sin + i, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(cos_sin + PAIRS + i, mask=real, other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    dtype = head.dtype.element_ty
    tl.store(head + low, a.to(dtype), mask=real)
    tl.store(head + high, b.to(dtype), mask=real)
    if REST_BLOCK:
        tl.store(head + rest, c.to(dtype), mask=last)


@triton.jit(do_not_specialize=["num_rows", "stride_table"])  # no new variant for another batch while serving
def inputs_kernel(
    qkv, projections, reads, rounded, delta, q_norm, k_norm, cos_sin, gate_bias, state_cache, block_table,
    query_start_loc, seq_lens, initial_states, initial_slot, write_enabled, last_states, counter, num_rows, eps,
    stride_qkv, stride_token, stride_read, stride_cos_sin, stride_block, stride_cell, stride_table,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, PROGRAMS: tl.constexpr,
    CORRECT_Q: tl.constexpr, CORRECT_K: tl.constexpr, CORRECT_V: tl.constexpr, STEP: tl.constexpr,
    PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    RANK: tl.constexpr, HEADS: tl.constexpr, RANKWISE: tl.constexpr, COUPLED: tl.constexpr, MODE: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS_PER_STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (rows if STEP, else tokens; PROGRAMS heads from FIRST on). In place on qkv, reads and, if STEP, the states.

    STEP: each row has one token or none. Else reads are given, as ``delta_rule`` left them. counter: int32 [rows] of
    zeros, and again zeros after it.
    """
    WIDTH: tl.constexpr = HEADS * RANK
    rows, head = tl.arange(0, ROWS), FIRST + tl.program_id(1)
    live = rows < WIDTH
    if STEP:
        row = tl.program_id(0)
        token = tl.load(query_start_loc + row)
        if token >= tl.load(query_start_loc + row + 1):  # padding
            return
        position = tl.load(seq_lens + row) - 1
        element = rows[:, None] * RANK + tl.arange(0, RANK)[None, :]
        old = load_start(
            state_cache, block_table, initial_states, initial_slot, row, position, element, live[:, None],
            stride_block, stride_cell, stride_table, WIDTH * RANK, BLOCK_SIZE, TOKENS_PER_STATE,
        )  # fmt: skip
        bias_beta, bias_lambda = load_bias(gate_bias, rows, RANK, HEADS, RANKWISE, COUPLED)
        q, k, v, beta, lam = load_token(token, rows, projections, stride_token, RANK, HEADS, RANKWISE, COUPLED)
        q, k, keep, erase, write = activate(q, k, beta, lam, bias_beta, bias_lambda, COUPLED, MODE, NORMALIZE)
        read = tl.sum(old * q, axis=1)
        if tl.program_id(1) == 0:
            tl.store(reads + tl.cast(token, tl.int64) * stride_read + rows, read, mask=live)
    else:
        token = tl.program_id(0)
        if token >= tl.load(query_start_loc + num_rows):
            return
        low, high = 0, num_rows
        while high - low > 1:  # the last row that begins at or before the token: rows without tokens come before it
            middle = (low + high) // 2
            before = tl.load(query_start_loc + middle) <= token
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        position = tl.load(seq_lens + low) - (tl.load(query_start_loc + low + 1) - token)
        read = tl.load(reads + tl.cast(token, tl.int64) * stride_read + rows, mask=live, other=0.0)
    if rounded is not None:  # noqa: SIM102, a compile-time one
        if tl.program_id(1) == 0:
            tl.store(rounded + tl.cast(token, tl.int64) * WIDTH + rows, read.to(rounded.dtype.element_ty), mask=live)

    column = qkv + tl.cast(token, tl.int64) * stride_qkv + head * HEAD_DIM
    if cos_sin is not None:
        cos_sin += tl.cast(position, tl.int64) * stride_cos_sin
    K_DELTA: tl.constexpr = Q_HEADS if CORRECT_Q else 0  # heads of delta before those of k, and of v
    V_DELTA: tl.constexpr = K_DELTA + (KV_HEADS if CORRECT_K else 0)
    each: tl.constexpr = HEAD_DIM * WIDTH
    if head < Q_HEADS:
        treat_head(
            column, delta + head * each if CORRECT_Q else None, q_norm, cos_sin, read, live, eps,
            WIDTH, HEAD_DIM, PAIRS, PAIR_BLOCK, REST_BLOCK, INTERLEAVED, ROWS,
        )  # fmt: skip
    elif head < Q_HEADS + KV_HEADS:
        treat_head(
            column, delta + (K_DELTA + head - Q_HEADS) * each if CORRECT_K else None, k_norm, cos_sin, read, live, eps,
            WIDTH, HEAD_DIM, PAIRS, PAIR_BLOCK, REST_BLOCK, INTERLEAVED, ROWS,
        )  # fmt: skip
    elif CORRECT_V:
        treat_head(
            column, delta + (V_DELTA + head - Q_HEADS - KV_HEADS) * each, None, None, read, live, eps,
            WIDTH, HEAD_DIM, PAIRS, PAIR_BLOCK, REST_BLOCK, INTERLEAVED, ROWS,
        )  # fmt: skip

    if STEP:  # noqa: SIM102, a compile-time one
        if is_last(counter + row, PROGRAMS):  # all others have read the old state
            change = write * v - erase * tl.sum(old * k, axis=1)
            new = keep[:, None] * old + change[:, None] * k
            if write_enabled is not None:
                new = tl.where(tl.load(write_enabled + row) != 0, new, old)
            cell, real = cell_of(
                state_cache, block_table, row, position, stride_block, stride_cell, stride_table,
                BLOCK_SIZE, TOKENS_PER_STATE,
            )  # fmt: skip
            tl.store(cell + element, new, mask=live[:, None] & real)
            if last_states is not None:
                session = tl.load(initial_slot + row).to(tl.int64)
                ring = last_states + (session * 2 + position % 2) * (WIDTH * RANK)
                tl.store(ring + element, new, mask=live[:, None] & (session >= 0))
