"""The kernel between a layer's fused projection and its attention: δ-mem's step, its corrections, q/k norm and RoPE.

A program takes one head of one token. Decode (STEP): every program of a row reads the row's old state and computes the
same few reads from it, which costs less than a launch; the last one to do so writes the new state.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import is_last
from mem_triton.ops.delta_rule.kernel_parts import activate, cell_of, load_bias, load_start, load_token


@triton.jit
def treat_head(head, delta, norm, cos_sin, read, live, eps, WIDTH: tl.constexpr, LAYER):
    """One head in place: PAIRS pairs of channels, maybe rotated, and a rest. delta, norm, cos_sin: None = none."""
    PAIRS: tl.constexpr = LAYER.PAIRS
    REST_BLOCK: tl.constexpr = LAYER.REST_BLOCK
    i, row = tl.arange(0, LAYER.PAIR_BLOCK), tl.arange(0, LAYER.ROWS)
    real = i < PAIRS
    low, high = (2 * i, 2 * i + 1) if LAYER.INTERLEAVED else (i, i + PAIRS)
    a = tl.load(head + low, mask=real, other=0.0).to(tl.float32)
    b = tl.load(head + high, mask=real, other=0.0).to(tl.float32)
    rest = 2 * PAIRS + tl.arange(0, REST_BLOCK if REST_BLOCK else 1)
    last = rest < LAYER.HEAD_DIM
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
        scale = 1.0 / tl.sqrt(square / LAYER.HEAD_DIM + eps)
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
    qkv,
    projections,
    reads,
    rounded,
    inputs,
    batch,
    counter,
    num_rows,
    stride_qkv,
    stride_token,
    stride_read,
    stride_table,
    LAYER,
    RULE,
):
    """Grid (rows if STEP, else tokens; PROGRAMS heads from FIRST on). In place on qkv, reads and, if STEP, the states.

    STEP: each row has one token or none. Else reads are given, as ``delta_rule`` left them. counter: int32 [rows] of
    zeros, and again zeros after it.
    """
    WIDTH: tl.constexpr = RULE.WIDTH
    RANK: tl.constexpr = RULE.RANK
    rows, head = tl.arange(0, LAYER.ROWS), LAYER.FIRST + tl.program_id(1)
    live = rows < WIDTH
    if LAYER.STEP:
        row = tl.program_id(0)
        token = tl.load(batch.query_start_loc + row)
        if token >= tl.load(batch.query_start_loc + row + 1):  # padding
            return
        position = tl.load(batch.seq_lens + row) - 1
        element = rows[:, None] * RANK + tl.arange(0, RANK)[None, :]
        old = load_start(batch, row, position, element, live[:, None], stride_table, RULE)
        bias_beta, bias_lambda = load_bias(batch.gate_bias, rows, RULE)
        q, k, v, beta, lam = load_token(token, rows, projections, stride_token, RULE)
        q, k, keep, erase, write = activate(q, k, beta, lam, bias_beta, bias_lambda, RULE)
        read = tl.sum(old * q, axis=1)
        if tl.program_id(1) == 0:
            tl.store(reads + tl.cast(token, tl.int64) * stride_read + rows, read, mask=live)
    else:
        token = tl.program_id(0)
        if token >= tl.load(batch.query_start_loc + num_rows):
            return
        low, high = 0, num_rows
        while high - low > 1:  # the last row that begins at or before the token: rows without tokens come before it
            middle = (low + high) // 2
            before = tl.load(batch.query_start_loc + middle) <= token
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        position = tl.load(batch.seq_lens + low) - (tl.load(batch.query_start_loc + low + 1) - token)
        read = tl.load(reads + tl.cast(token, tl.int64) * stride_read + rows, mask=live, other=0.0)
    if rounded is not None:  # noqa: SIM102, a compile-time one
        if tl.program_id(1) == 0:
            tl.store(rounded + tl.cast(token, tl.int64) * WIDTH + rows, read.to(rounded.dtype.element_ty), mask=live)

    column = qkv + tl.cast(token, tl.int64) * stride_qkv + head * LAYER.HEAD_DIM
    cos_sin = None
    if inputs.cos_sin is not None:
        cos_sin = inputs.cos_sin + tl.cast(position, tl.int64) * inputs.stride_cos_sin
    Q_HEADS: tl.constexpr = LAYER.Q_HEADS
    KV_HEADS: tl.constexpr = LAYER.KV_HEADS
    K_DELTA: tl.constexpr = Q_HEADS if LAYER.CORRECT_Q else 0  # heads of delta before those of k, and of v
    V_DELTA: tl.constexpr = K_DELTA + (KV_HEADS if LAYER.CORRECT_K else 0)
    each: tl.constexpr = LAYER.HEAD_DIM * WIDTH
    if head < Q_HEADS:
        of_q = inputs.delta + head * each if LAYER.CORRECT_Q else None
        treat_head(column, of_q, inputs.q_norm, cos_sin, read, live, inputs.eps, WIDTH, LAYER)
    elif head < Q_HEADS + KV_HEADS:
        of_k = inputs.delta + (K_DELTA + head - Q_HEADS) * each if LAYER.CORRECT_K else None
        treat_head(column, of_k, inputs.k_norm, cos_sin, read, live, inputs.eps, WIDTH, LAYER)
    elif LAYER.CORRECT_V:
        of_v = inputs.delta + (V_DELTA + head - Q_HEADS - KV_HEADS) * each
        treat_head(column, of_v, None, None, read, live, inputs.eps, WIDTH, LAYER)

    if LAYER.STEP:  # noqa: SIM102, a compile-time one
        if is_last(counter + row, LAYER.PROGRAMS):  # all others have read the old state
            change = write * v - erase * tl.sum(old * k, axis=1)
            new = keep[:, None] * old + change[:, None] * k
            if batch.write_enabled is not None:
                new = tl.where(tl.load(batch.write_enabled + row) != 0, new, old)
            cell, real = cell_of(batch, row, position, stride_table, RULE)
            tl.store(cell + element, new, mask=live[:, None] & real)
            if batch.last_states is not None:
                session = tl.load(batch.initial_slot + row).to(tl.int64)
                ring = batch.last_states + (session * 2 + position % 2) * (WIDTH * RANK)
                tl.store(ring + element, new, mask=live[:, None] & (session >= 0))
