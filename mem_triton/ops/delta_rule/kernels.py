"""The delta rule's Triton kernel for short queries. State in fp32; rows of a state never meet."""

import triton
import triton.language as tl

from mem_triton.ops.delta_rule.kernel_parts import activate, cell_of, load_bias, load_start, load_token


@triton.jit(do_not_specialize=["stride_table"])  # no new variant for another batch while serving
def recurrent_kernel(
    projections,
    reads,
    batch,
    stride_token,
    stride_read,
    stride_table,
    RULE,
    ROWS: tl.constexpr,
):
    """Walks the tokens of one row of the batch. Grid (batch rows, groups of ROWS state rows)."""
    RANK: tl.constexpr = RULE.RANK
    WIDTH: tl.constexpr = RULE.WIDTH
    row = tl.program_id(0)
    first, last = tl.load(batch.query_start_loc + row), tl.load(batch.query_start_loc + row + 1)
    if first >= last:
        return

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = (rows < WIDTH)[:, None]
    element = rows[:, None] * RANK + tl.arange(0, RANK)[None, :]  # [ROWS, RANK] within a state
    length = tl.load(batch.seq_lens + row)
    computed = length - (last - first)
    writing = 1
    if batch.write_enabled is not None:
        writing = tl.load(batch.write_enabled + row)

    state = load_start(batch, row, computed, element, live, stride_table, RULE)
    bias_beta, bias_lambda = load_bias(batch.gate_bias, rows, RULE)
    q, k, v, beta, lam = load_token(first, rows, projections, stride_token, RULE)
    for token in range(first, last):
        following = tl.minimum(token + 1, last - 1)  # loaded now, so that the next step need not wait for it
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
        tl.store(ring + element, state, mask=live & (session >= 0))
