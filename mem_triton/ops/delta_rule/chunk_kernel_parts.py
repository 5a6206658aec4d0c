"""Device functions of the kernels for chunks: what they load, and how a chunk finds its start. Everything is fp32."""

import triton
import triton.language as tl

from mem_triton.ops.delta_rule.kernel_parts import cell_of
from mem_triton.ops.delta_rule.kernel_rows import chosen, columns_of, load_row

PARTS = tl.constexpr(5)
"""What ``activate_kernel`` leaves of a token and head, RANK floats each: k, q, keep, erase, write * v."""


@triton.jit
def head_parts(active, token, row, RULE):
    """Pointer to what ``activate_kernel`` left of a token and the head of a state row."""
    return active + (tl.cast(token, tl.int64) * RULE.HEADS + row // RULE.RANK) * (PARTS * RULE.RANK)


@triton.jit
def load_active(parts, inner, RANK: tl.constexpr):
    """One token's k, a tuple of RANK numbers, and keep, erase and push (write * v) of a head's state rows ``inner``."""
    gates = parts + 2 * RANK + inner
    return load_row(parts, True, RANK), tl.load(gates), tl.load(gates + RANK), tl.load(gates + 2 * RANK)


@triton.jit
def load_start_row(batch, row, computed, rows, stride_table, RULE):
    """State rows before this step: of the last token's cell, or of the session's state, or zeros."""
    RANK: tl.constexpr = RULE.RANK
    cell, real = cell_of(batch, row, tl.maximum(computed - 1, 0), stride_table, RULE)
    state = load_row(cell + rows * RANK, real & (computed > 0), RANK)
    if batch.initial_states is not None:
        slot = tl.load(batch.initial_slot + row).to(tl.int64)
        use = (slot >= 0) & (computed == 0)
        start = load_row(batch.initial_states + slot * (RULE.WIDTH * RANK) + rows * RANK, use, RANK)
        state = chosen(use, start, state, RANK)
    return state


@triton.jit
def load_mapped_start(maps, first_map, chunk, writing, first_row, RULE, ROWS: tl.constexpr):
    """State rows at the start of chunk ``chunk`` of the batch row whose maps begin at ``first_map``."""
    RANK: tl.constexpr = RULE.RANK
    basis, lane = tl.arange(0, RANK), tl.arange(0, ROWS * RANK)  # a lane: an element of the program's state rows
    row_map: tl.constexpr = (RANK + 1) * RANK  # RANK images of basis vectors, then the offset
    base = maps + tl.cast(first_map, tl.int64) * (RULE.WIDTH * row_map)
    place = (first_row + lane // RANK) * row_map + lane % RANK
    rows = first_row + tl.arange(0, ROWS)
    row = load_row(base + rows * row_map, True, RANK)  # chunk 0 keeps the start in place of its map
    if chunk > 0 and writing != 0:
        state = tl.load(base + place + RANK * RANK)  # and its end in place of the offset
        for _ in tl.range(1, chunk, num_stages=4):  # keeps the next maps' loads in flight: the chain is all latency
            base += RULE.WIDTH * row_map
            transfer = tl.load(base + basis[:, None] * RANK + place[None, :])  # [basis vector, lane]
            push = tl.load(base + place + RANK * RANK)
            state = tl.sum(transfer * row_of_lanes(state, ROWS, RANK), axis=0) + push
        row = columns_of(tl.reshape(state, [ROWS, RANK]), RANK)
    return row


@triton.jit
def row_of_lanes(state, ROWS: tl.constexpr, RANK: tl.constexpr):
    """[RANK, ROWS * RANK]: beside each element of state rows its whole row."""
    columns = tl.trans(tl.reshape(state, [ROWS, RANK]))
    return tl.reshape(tl.broadcast_to(columns[:, :, None], [RANK, ROWS, RANK]), [RANK, ROWS * RANK])
