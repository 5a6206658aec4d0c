"""``delta_rule_paged`` on the CPU: the recurrence token by token, compiled by numba.

A step of a few rows costs microseconds this way, where every torch operator would cost as many; and a token of a long
prompt costs less here than its share of a chunk-parallel scan, since a CPU core has nothing to run in parallel with it.
A row's result depends on that row alone: the same bits whatever else is in the batch, and however a prompt is cut.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from mem_triton.ops.common.compiled import OPTIONS
from mem_triton.ops.delta_rule.reference import L2_NORM_EPS, MODES, DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch

NULL_BLOCK = 0  # the serving engine's placeholder block: never read as a state, never written
_NO_SLOTS, _NO_STATES, _NO_RING = np.empty(0, np.int32), np.empty((0, 0), np.float32), np.empty((0, 0, 0), np.float32)


def step_rows(
    projections: Tensor,
    reads: Tensor,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
) -> None:
    """Advance all rows of a batch in place; arguments as in ``op.delta_rule_paged``. max_query_len: not needed here."""

    def array(tensor: Tensor | None, absent: np.ndarray) -> np.ndarray:
        return absent if tensor is None else tensor.numpy()

    _advance(
        projections.float().numpy(),
        reads.numpy(),
        *(tensor.numpy() for tensor in batch[:5]),
        array(batch.initial_states, _NO_STATES),
        array(batch.initial_slot, _NO_SLOTS),
        array(batch.write_enabled, _NO_SLOTS),
        array(batch.last_states, _NO_RING),
        spec.rank,
        spec.heads,
        spec.rankwise_gates,
        spec.couple_lambda,
        MODES[spec.update_mode],
        spec.normalize_qk,
        block_size,
        tokens_per_state,
    )


@njit(inline="always")
def _normalize(raw, out, first, rank, normalize):
    """out[:rank] = l2norm(tanh(raw[first : first + rank])), or the raw values."""
    square = np.float32(0)
    for j in range(rank):
        x = raw[first + j]
        out[j] = math.tanh(x) if normalize else x
        square += out[j] * out[j]
    if normalize:
        scale = np.float32(1) / max(math.sqrt(square), np.float32(L2_NORM_EPS))
        for j in range(rank):
            out[j] *= scale


@njit(inline="always")
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + math.exp(-x))


@njit(
    "void(f4[:,:], f4[:,:], f4[:], f4[:,:,:], i4[:,:], i4[:], i4[:], f4[:,:], i4[:], i4[:], f4[:,:,:],"
    "i8, i8, b1, b1, i8, b1, i8, i8)",
    **OPTIONS,
)
def _advance(
    projections,
    reads,
    gate_bias,
    cache,
    block_table,
    starts,
    lengths,
    initial,
    slots,
    writes,
    ring,
    rank,
    heads,
    rankwise,
    coupled,
    mode,
    normalize,
    block_size,
    span,
):
    """Arrays as the op's tensors; those that are not given are empty. The state is [H*r, r]: rows never mix."""
    one = np.float32(1)
    width = heads * rank
    gates = width if rankwise else heads
    state = np.empty((width, rank), np.float32)
    q, k = np.empty(rank, np.float32), np.empty(rank, np.float32)
    for row in range(len(lengths)):
        begin, end = starts[row], starts[row + 1]
        if begin == end:  # padding
            continue
        computed = lengths[row] - (end - begin)
        slot = slots[row] if len(slots) > 0 else -1
        held = len(writes) > 0 and writes[row] == 0
        flat = state.reshape(-1)
        flat[:] = 0
        if computed > 0:
            block = block_table[row, (computed - 1) // block_size]
            if block != NULL_BLOCK:
                flat[:] = cache[block, (computed - 1) % block_size // span]
        elif slot >= 0 and len(initial) > 0:
            flat[:] = initial[slot]

        for token in range(begin, end):
            raw, position = projections[token], computed + (token - begin)
            for head in range(heads):
                _normalize(raw, q, head * rank, rank, normalize)
                _normalize(raw, k, width + head * rank, rank, normalize)
                for i in range(head * rank, (head + 1) * rank):
                    gate = i if rankwise else head
                    write = _sigmoid(raw[3 * width + gate] + gate_bias[gate])
                    if mode == 2:
                        keep = one
                    elif coupled:
                        keep = one - write
                    else:
                        keep = _sigmoid(raw[3 * width + gates + gate] + gate_bias[gates + gate])
                    erase = keep * write if mode == 1 else write
                    read, erased = np.float32(0), np.float32(0)
                    for j in range(rank):
                        read += state[i, j] * q[j]
                        erased += state[i, j] * k[j]
                    reads[token, i] = read
                    if not held:
                        change = write * raw[2 * width + i] - erase * erased
                        for j in range(rank):
                            state[i, j] = keep * state[i, j] + change * k[j]
            if (position + 1) % span == 0 or token == end - 1:
                block = block_table[row, position // block_size]
                if block != NULL_BLOCK:
                    cache[block, position % block_size // span] = flat
        if slot >= 0 and len(ring) > 0:
            ring[slot, (lengths[row] - 1) % 2] = flat
