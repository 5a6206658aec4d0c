"""The delta rule's Triton kernels for long queries: three launches, each over chunks of CHUNK tokens.

``activate_kernel`` turns the projections of all tokens into what the recurrence takes, for many tokens at once.
``chunk_maps_kernel`` turns every chunk but a row's last into an affine map of the state. ``chunk_scan_kernel`` chains
the maps before its chunk, which gives it the chunk's start, and walks the chunk's tokens.

A program of the last two owns ROWS state rows of one head. A state is a tuple of RANK tensors, one for each column, so
that a lane keeps a whole state row in registers: sums over RANK need no other lane, and all lanes take the same k.
"""

import triton
import triton.language as tl

from mem_triton.ops.common.kernel_parts import find_block
from mem_triton.ops.delta_rule.chunk_kernel_parts import (
    PARTS,
    head_parts,
    load_active,
    load_mapped_start,
    load_start_row,
)
from mem_triton.ops.delta_rule.kernel_parts import activate, cell_of
from mem_triton.ops.delta_rule.kernel_rows import dot, filled, load_row, step, store_row, unit_rows


@triton.jit(do_not_specialize=["num_tokens"])
def activate_kernel(projections, gate_bias, active, num_tokens, stride_token, RULE, TOKENS: tl.constexpr):
    """Fills active, fp32 [T, H, PARTS, RANK]: k | q | keep | erase | write * v. Grid (groups of TOKENS, heads)."""
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    head, d = tl.program_id(1), tl.arange(0, RANK)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = (tokens < num_tokens)[:, None]
    rows = head * RANK + d
    base = projections + tl.cast(tokens, tl.int64)[:, None] * stride_token
    gate = rows if RULE.RANKWISE else rows // RANK
    second: tl.constexpr = 0 if RULE.COUPLED else (WIDTH if RULE.RANKWISE else RULE.HEADS)
    q = tl.load(base + rows[None, :], mask=real, other=0.0).to(tl.float32)
    k = tl.load(base + (WIDTH + rows)[None, :], mask=real, other=0.0).to(tl.float32)
    v = tl.load(base + (2 * WIDTH + rows)[None, :], mask=real, other=0.0).to(tl.float32)
    beta = tl.load(base + (3 * WIDTH + gate)[None, :], mask=real, other=0.0).to(tl.float32)
    lam = tl.load(base + (3 * WIDTH + second + gate)[None, :], mask=real, other=0.0).to(tl.float32)
    bias_beta, bias_lambda = tl.load(gate_bias + gate), tl.load(gate_bias + second + gate)
    q, k, keep, erase, write = activate(q, k, beta, lam, bias_beta[None, :], bias_lambda[None, :], RULE)
    out = active + (tl.cast(tokens, tl.int64)[:, None] * RULE.HEADS + head) * (PARTS * RANK) + d[None, :]
    tl.store(out, k, mask=real)
    tl.store(out + RANK, q, mask=real)
    tl.store(out + 2 * RANK, keep, mask=real)
    tl.store(out + 3 * RANK, erase, mask=real)
    tl.store(out + 4 * RANK, write * v, mask=real)


@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def chunk_maps_kernel(active, batch, maps, num_rows, stride_table, RULE, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (chunk slots, groups of ROWS state rows). Fills maps but for a row's last chunk.

    maps: fp32 [T // CHUNK, H*r, RANK + 1, RANK], of each state row the RANK images of basis vectors, then that of zero.

    A row's maps begin at first // CHUNK: it has at most as many as there are whole chunks up to the next row's.

    Chunk 0 knows its start: it is walked, and start and end are kept. (The start must be copied: the next kernel
    overwrites the cell it came from.) A later chunk is walked from every basis vector and from zero.
    """
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    row, chunk = find_block(batch.query_start_loc, num_rows, tl.program_id(0), CHUNK)
    first, last = tl.load(batch.query_start_loc + row), tl.load(batch.query_start_loc + row + 1)
    begin = first + chunk * CHUNK
    writing = 1
    if batch.write_enabled is not None:
        writing = tl.load(batch.write_enabled + row)
    if begin + CHUNK >= last or (chunk > 0 and writing == 0):  # a frozen row needs its start only
        return

    lane = tl.arange(0, ROWS * RANK)
    rows, basis = tl.program_id(1) * ROWS + lane // RANK, lane % RANK
    row_map: tl.constexpr = (RANK + 1) * RANK
    base = maps + tl.cast(first // CHUNK + chunk, tl.int64) * (WIDTH * row_map) + rows * row_map
    state = filled(0.0, ROWS * RANK, RANK)
    if chunk == 0:
        computed = tl.load(batch.seq_lens + row) - (last - first)
        state = load_start_row(batch, row, computed, rows, stride_table, RULE)
        store_row(base, state, basis == 0, RANK)

    images = unit_rows(basis, RANK)
    parts = head_parts(active, begin, tl.program_id(1) * ROWS, RULE)
    k, keep, erase, push = load_active(parts, rows % RANK, RANK)
    for _ in range(CHUNK):
        parts += RULE.HEADS * (PARTS * RANK)  # the next token, also behind the last: ``active`` has one more
        k1, keep1, erase1, push1 = load_active(parts, rows % RANK, RANK)
        state = step(state, k, keep, erase, push, RANK)
        images = step(images, k, keep, erase, 0.0, RANK)
        k, keep, erase, push = k1, keep1, erase1, push1

    store_row(base + RANK * RANK, state, basis == 0, RANK)
    if chunk > 0:
        store_row(base + basis * RANK, images, True, RANK)


@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def chunk_scan_kernel(
    active, reads, batch, maps, num_rows, stride_read, stride_table, RULE, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """Grid as ``chunk_maps_kernel``, which has left maps. Stores what each token reads, and the states of cells."""
    RANK: tl.constexpr = RULE.RANK
    row, chunk = find_block(batch.query_start_loc, num_rows, tl.program_id(0), CHUNK)
    first, last = tl.load(batch.query_start_loc + row), tl.load(batch.query_start_loc + row + 1)
    begin = first + chunk * CHUNK
    end = tl.minimum(begin + CHUNK, last)
    if begin >= end:
        return

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    length = tl.load(batch.seq_lens + row)
    computed = length - (last - first)
    writing = 1
    if batch.write_enabled is not None:
        writing = tl.load(batch.write_enabled + row)
    if last - first > CHUNK:
        state = load_mapped_start(maps, first // CHUNK, chunk, writing, tl.program_id(1) * ROWS, RULE, ROWS)
    else:
        state = load_start_row(batch, row, computed, rows, stride_table, RULE)

    parts = head_parts(active, begin, tl.program_id(1) * ROWS, RULE)
    k, keep, erase, push = load_active(parts, rows % RANK, RANK)
    q = load_row(parts + RANK, True, RANK)
    for token in range(begin, end):
        parts += RULE.HEADS * (PARTS * RANK)
        k1, keep1, erase1, push1 = load_active(parts, rows % RANK, RANK)
        q1 = load_row(parts + RANK, True, RANK)
        tl.store(reads + tl.cast(token, tl.int64) * stride_read + rows, dot(state, q, RANK))
        if writing != 0:
            state = step(state, k, keep, erase, push, RANK)
        position = computed + (token - first)
        if (position + 1) % RULE.TOKENS_PER_STATE == 0 or token == last - 1:
            cell, real = cell_of(batch, row, position, stride_table, RULE)
            store_row(cell + rows * RANK, state, real, RANK)
        k, q, keep, erase, push = k1, q1, keep1, erase1, push1

    if batch.last_states is not None:
        session = tl.load(batch.initial_slot + row).to(tl.int64)
        ring = batch.last_states + (session * 2 + (length - 1) % 2) * (RULE.WIDTH * RANK)
        store_row(ring + rows * RANK, state, (session >= 0) & (end == last), RANK)
