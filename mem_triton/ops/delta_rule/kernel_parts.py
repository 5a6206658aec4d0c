"""Device functions that the delta rule's kernels share. Everything is fp32.

A state row is one of the H*r rows of a layer's state; a program owns ROWS of them. Rows never mix, so every reduction
runs along a row. ``recurrent_kernel`` takes projections as they are, those for chunks what ``activate_kernel`` left.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import tanh


@triton.jit
def load_token(token, rows, projections, stride_token, RULE):
    """One token's raw projections for these state rows: q, k [ROWS, RANK] and v, beta, lambda [ROWS], fp32."""
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    base = projections + tl.cast(token, tl.int64) * stride_token
    live = rows < WIDTH
    column = (rows // RANK * RANK)[:, None] + tl.arange(0, RANK)[None, :]
    gate = rows if RULE.RANKWISE else rows // RANK
    q = tl.load(base + column, mask=live[:, None], other=0.0).to(tl.float32)
    k = tl.load(base + WIDTH + column, mask=live[:, None], other=0.0).to(tl.float32)
    v = tl.load(base + 2 * WIDTH + rows, mask=live, other=0.0).to(tl.float32)
    beta = tl.load(base + 3 * WIDTH + gate, mask=live, other=0.0).to(tl.float32)
    second: tl.constexpr = 0 if RULE.COUPLED else (WIDTH if RULE.RANKWISE else RULE.HEADS)
    lam = tl.load(base + 3 * WIDTH + second + gate, mask=live, other=0.0).to(tl.float32)
    return q, k, v, beta, lam


@triton.jit
def activate(q, k, beta, lam, bias_beta, bias_lambda, RULE):
    """q, k, keep, erase, write of the recurrence. MODE: 0 standard, 1 lambda_outside, 2 no_lambda."""
    if RULE.NORMALIZE:
        q, k = tanh(q), tanh(k)
        q = q / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), 1e-6)[:, None]
        k = k / tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), 1e-6)[:, None]
    write = tl.sigmoid(beta + bias_beta)
    keep = 1.0 - write if RULE.COUPLED else tl.sigmoid(lam + bias_lambda)
    if RULE.MODE == 2:
        keep = tl.full(write.shape, 1.0, tl.float32)
    erase = keep * write if RULE.MODE == 1 else write
    return q, k, keep, erase, write


@triton.jit
def load_bias(gate_bias, rows, RULE):
    """Biases of beta and lambda of these state rows."""
    live, gate = rows < RULE.WIDTH, rows if RULE.RANKWISE else rows // RULE.RANK
    second: tl.constexpr = 0 if RULE.COUPLED else (RULE.WIDTH if RULE.RANKWISE else RULE.HEADS)
    beta = tl.load(gate_bias + gate, mask=live, other=0.0)
    return beta, tl.load(gate_bias + second + gate, mask=live, other=0.0)


@triton.jit
def cell_of(batch, row, position, stride_table, RULE):
    """Pointer to the state of this position, and whether there is one (block 0 has none)."""
    entry = batch.block_table + tl.cast(row, tl.int64) * stride_table + position // RULE.BLOCK_SIZE
    block = tl.load(entry).to(tl.int64)
    cell = position % RULE.BLOCK_SIZE // RULE.TOKENS_PER_STATE
    return batch.state_cache + block * batch.stride_block + cell * batch.stride_cell, block != 0


@triton.jit
def load_start(batch, row, computed, element, live, stride_table, RULE):
    """A row's state before this step: its last token's cell, or its session's state, or zeros."""
    cell, real = cell_of(batch, row, tl.maximum(computed - 1, 0), stride_table, RULE)
    state = tl.load(cell + element, mask=live & real & (computed > 0), other=0.0)
    if batch.initial_states is not None:
        slot = tl.load(batch.initial_slot + row).to(tl.int64)
        use = (slot >= 0) & (computed == 0)
        start = batch.initial_states + slot * (RULE.WIDTH * RULE.RANK)
        state = tl.where(use, tl.load(start + element, mask=live & use, other=0.0), state)
    return state
