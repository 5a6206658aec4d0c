"""Device functions that the delta rule's kernels share. Everything is fp32 and laid out by state row.

A state row is one of the H*r rows of a layer's state; a program owns ROWS of them. Rows never mix, so a row's gates and
its head's q and k are loaded once per row, and every reduction runs along the row.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import tanh


@triton.jit
def load_token(
    token, rows, projections, stride_token,
    RANK: tl.constexpr, HEADS: tl.constexpr, RANKWISE: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """One token's raw projections for these state rows: q, k [ROWS, RANK] and v, beta, lambda [ROWS], fp32."""
    width: tl.constexpr = HEADS * RANK
    base = projections + tl.cast(token, tl.int64) * stride_token
    live = rows < width
    column = (rows // RANK * RANK)[:, None] + tl.arange(0, RANK)[None, :]
    gate = rows if RANKWISE else rows // RANK
    q = tl.load(base + column, mask=live[:, None], other=0.0).to(tl.float32)
    k = tl.load(base + width + column, mask=live[:, None], other=0.0).to(tl.float32)
    v = tl.load(base + 2 * width + rows, mask=live, other=0.0).to(tl.float32)
    beta = tl.load(base + 3 * width + gate, mask=live, other=0.0).to(tl.float32)
    second: tl.constexpr = 0 if COUPLED else (width if RANKWISE else HEADS)
    lam = tl.load(base + 3 * width + second + gate, mask=live, other=0.0).to(tl.float32)
    return q, k, v, beta, lam


@triton.jit
def activate(
    q, k, beta, lam, bias_beta, bias_lambda, COUPLED: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr
):
    """q, k, keep, erase, write of the recurrence. MODE: 0 standard, 1 lambda_outside, 2 no_lambda."""
    if NORMALIZE:
        q, k = tanh(q), tanh(k)
        q = q / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), 1e-6)[:, None]
        k = k / tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), 1e-6)[:, None]
    write = tl.sigmoid(beta + bias_beta)
    keep = 1.0 - write if COUPLED else tl.sigmoid(lam + bias_lambda)
    if MODE == 2:
        keep = tl.full(write.shape, 1.0, tl.float32)
    erase = keep * write if MODE == 1 else write
    return q, k, keep, erase, write


@triton.jit
def load_bias(gate_bias, rows, RANK: tl.constexpr, HEADS: tl.constexpr, RANKWISE: tl.constexpr, COUPLED: tl.constexpr):
    live, gate = rows < HEADS * RANK, rows if RANKWISE else rows // RANK
    second: tl.constexpr = 0 if COUPLED else (HEADS * RANK if RANKWISE else HEADS)
    beta = tl.load(gate_bias + gate, mask=live, other=0.0)
    return beta, tl.load(gate_bias + second + gate, mask=live, other=0.0)


@triton.jit
def find_chunk(query_start_loc, num_rows, slot, CHUNK: tl.constexpr):
    """Row and chunk number of grid slot ``slot``. Row n owns the slots from start[n] // CHUNK + n on: enough for it."""
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(query_start_loc + middle) // CHUNK + middle <= slot
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    return low, slot - (tl.load(query_start_loc + low) // CHUNK + low)


@triton.jit
def cell_of(state_cache, block_table, row, position, stride_block, stride_cell, stride_table,
          BLOCK_SIZE: tl.constexpr, TOKENS_PER_STATE: tl.constexpr):  # fmt: skip
    """Pointer to the state of this position, and whether there is one (block 0 has none)."""
    block = tl.load(block_table + tl.cast(row, tl.int64) * stride_table + position // BLOCK_SIZE).to(tl.int64)
    cell = position % BLOCK_SIZE // TOKENS_PER_STATE
    return state_cache + block * stride_block + cell * stride_cell, block != 0


@triton.jit
def load_start(state_cache, block_table, initial_states, initial_slot, row, computed, element, live,
                stride_block, stride_cell, stride_table,
                SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS_PER_STATE: tl.constexpr):  # fmt: skip
    """A row's state before this step: its last token's cell, or its session's state, or zeros."""
    cell, real = cell_of(state_cache, block_table, row, tl.maximum(computed - 1, 0), stride_block, stride_cell,
                       stride_table, BLOCK_SIZE, TOKENS_PER_STATE)  # fmt: skip
    state = tl.load(cell + element, mask=live & real & (computed > 0), other=0.0)
    if initial_states is not None:
        slot = tl.load(initial_slot + row).to(tl.int64)
        use = (slot >= 0) & (computed == 0)
        state = tl.where(use, tl.load(initial_states + slot * SIZE + element, mask=live & use, other=0.0), state)
    return state


@triton.jit
def load_mapped_start(maps, first_map, chunk, writing, rows, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """State at the start of chunk ``chunk`` of the row whose maps begin at ``first_map``, [ROWS, RANK]."""
    d = tl.arange(0, RANK)
    live = (rows < WIDTH)[:, None]
    row_map: tl.constexpr = (RANK + 1) * RANK  # RANK images of basis vectors, then the offset
    base = maps + tl.cast(first_map, tl.int64) * (WIDTH * row_map)
    offset = rows[:, None] * row_map + d[None, :]
    state = tl.load(base + offset, mask=live, other=0.0)  # chunk 0 keeps the start itself in place of its map
    if chunk > 0 and writing != 0:
        state = tl.load(base + offset + RANK * RANK, mask=live, other=0.0)  # and its end in place of the offset
        for _ in tl.range(1, chunk, num_stages=4):  # keeps the next maps' loads in flight: the chain is all latency
            base += WIDTH * row_map
            images = rows[:, None, None] * row_map + d[None, :, None] * RANK + d[None, None, :]
            transfer = tl.load(base + images, mask=live[:, :, None], other=0.0)  # [ROWS, basis vector, RANK]
            push = tl.load(base + offset + RANK * RANK, mask=live, other=0.0)
            state = tl.sum(transfer * state[:, :, None], axis=1) + push
    return state
