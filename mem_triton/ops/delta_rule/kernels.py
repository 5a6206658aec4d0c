"""The delta rule's Triton kernels. State in fp32; a program owns ROWS state rows and never meets another program's.

``recurrent_kernel`` walks the tokens of one row of the batch or, with CHUNK > 0, of one chunk of it.
``chunk_maps_kernel`` runs before it on long rows: it turns every chunk but the last into an affine map of the state, so
that each program of ``recurrent_kernel`` finds its own start by chaining the maps of the chunks before it.
"""

import triton
import triton.language as tl

from mem_triton.ops.delta_rule.kernel_parts import (
    activate,
    cell_of,
    find_chunk,
    load_bias,
    load_mapped_start,
    load_start,
    load_token,
)


@triton.jit(do_not_specialize=["num_rows", "stride_table"])  # no new variant for another batch while serving
def recurrent_kernel(
    projections,
    reads,
    batch,
    maps,
    num_rows,
    stride_token,
    stride_read,
    stride_table,
    RULE,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (batch rows or chunk slots, groups of ROWS state rows). maps: as ``chunk_maps_kernel`` leaves them."""
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    if CHUNK == 0:
        row, chunk = tl.program_id(0), 0
    else:
        row, chunk = find_chunk(batch.query_start_loc, num_rows, tl.program_id(0), CHUNK)
    first, last = tl.load(batch.query_start_loc + row), tl.load(batch.query_start_loc + row + 1)
    begin, end = first, last
    if CHUNK > 0:
        begin = first + chunk * CHUNK
        end = tl.minimum(begin + CHUNK, last)
    if begin >= end:
        return

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = (rows < WIDTH)[:, None]
    element = rows[:, None] * RANK + tl.arange(0, RANK)[None, :]  # [ROWS, RANK] within a state
    length = tl.load(batch.seq_lens + row)
    computed = length - (last - first)
    writing = 1
    if batch.write_enabled is not None:
        writing = tl.load(batch.write_enabled + row)

    if CHUNK > 0 and last - first > CHUNK:
        state = load_mapped_start(maps, first // CHUNK, chunk, writing, rows, RANK, WIDTH)
    else:
        state = load_start(batch, row, computed, element, live, stride_table, RULE)

    bias_beta, bias_lambda = load_bias(batch.gate_bias, rows, RULE)
    q, k, v, beta, lam = load_token(begin, rows, projections, stride_token, RULE)
    for token in range(begin, end):
        following = tl.minimum(token + 1, end - 1)  # loaded now, so that the next step need not wait for it
        q1, k1, v1, beta1, lam1 = load_token(following, rows, projections, stride_token, RULE)
        q, k, keep, erase, write = activate(q, k, beta, lam, bias_beta, bias_lambda, RULE)
        tl.store(reads + tl.cast(token, tl.int64) * stride_read + rows, tl.sum(state * q, axis=1), mask=rows < WIDTH)
        change = write * v - erase * tl.sum(state * k, axis=1)
        state = tl.where(writing != 0, keep[:, None] * state + change[:, None] * k, state)
        position = computed + (token - first)
        if (position + 1) % RULE.TOKENS_PER_STATE == 0 or token == last - 1:
            cell, real = cell_of(batch, row, position, stride_table, RULE)
            tl.store(cell + element, state, mask=live & real)
        q, k, v, beta, lam = q1, k1, v1, beta1, lam1

    if batch.last_states is not None:
        session = tl.load(batch.initial_slot + row).to(tl.int64)
        ring = batch.last_states + (session * 2 + (length - 1) % 2) * (WIDTH * RANK)
        tl.store(ring + element, state, mask=live & (session >= 0) & (end == last))


@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def chunk_maps_kernel(
    projections,
    batch,
    maps,
    num_rows,
    stride_token,
    stride_table,
    RULE,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid as ``recurrent_kernel``. Fills maps, fp32 [T // CHUNK, H*r, RANK + 1, RANK], but for a row's last chunk.

    A row's maps begin at first // CHUNK: it has at most as many as there are whole chunks up to the next row's.

    Chunk 0 knows its start: it is walked, and start and end are kept. (The start must be copied: the next kernel
    overwrites the cell it came from.) A later chunk is walked from every basis vector and from zero.
    """
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    row, chunk = find_chunk(batch.query_start_loc, num_rows, tl.program_id(0), CHUNK)
    first, last = tl.load(batch.query_start_loc + row), tl.load(batch.query_start_loc + row + 1)
    begin = first + chunk * CHUNK
    writing = 1
    if batch.write_enabled is not None:
        writing = tl.load(batch.write_enabled + row)
    if begin + CHUNK >= last or (chunk > 0 and writing == 0):  # a frozen row needs its start only
        return

    d = tl.arange(0, RANK)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = (rows < WIDTH)[:, None]
    row_map: tl.constexpr = (RANK + 1) * RANK
    base = maps + tl.cast(first // CHUNK + chunk, tl.int64) * (WIDTH * row_map)
    offset = rows[:, None] * row_map + d[None, :]
    state = tl.zeros([ROWS, RANK], tl.float32)
    if chunk == 0:
        computed, element = tl.load(batch.seq_lens + row) - (last - first), rows[:, None] * RANK + d[None, :]
        state = load_start(batch, row, computed, element, live, stride_table, RULE)
        tl.store(base + offset, state, mask=live)

    images = tl.zeros([ROWS, RANK, RANK], tl.float32) + (d[:, None] == d[None, :]).to(tl.float32)[None, :, :]
    bias_beta, bias_lambda = load_bias(batch.gate_bias, rows, RULE)
    q, k, v, beta, lam = load_token(begin, rows, projections, stride_token, RULE)
    for token in range(begin, begin + CHUNK):
        following = tl.minimum(token + 1, begin + CHUNK - 1)
        q1, k1, v1, beta1, lam1 = load_token(following, rows, projections, stride_token, RULE)
        _, k, keep, erase, write = activate(q, k, beta, lam, bias_beta, bias_lambda, RULE)
        change = write * v - erase * tl.sum(state * k, axis=1)
        state = keep[:, None] * state + change[:, None] * k
        erased = erase[:, None] * tl.sum(images * k[:, None, :], axis=2)  # [ROWS, basis vector]
        images = keep[:, None, None] * images - erased[:, :, None] * k[:, None, :]
        q, k, v, beta, lam = q1, k1, v1, beta1, lam1

    tl.store(base + offset + RANK * RANK, state, mask=live)
    if chunk > 0:
        image = rows[:, None, None] * row_map + d[None, :, None] * RANK + d[None, None, :]
        tl.store(base + image, images, mask=live[:, :, None])
