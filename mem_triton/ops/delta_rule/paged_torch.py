"""``delta_rule_paged`` on the CPU, in torch: the product's path where there is no GPU.

Rows with one token (decode) go through one vectorised step together; a row with more tokens (prefill) goes through the
chunk-parallel scan, which hands back the states at its span ends in bulk. Nothing loops over tokens. Index arithmetic
is done in numpy, whose calls cost a fraction of torch's: at eight rows a step is all overhead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.ops.delta_rule.chunked import scan_with_states
from mem_triton.ops.delta_rule.reference import DeltaRuleInputs, DeltaRuleSpec, activate

NULL_BLOCK = 0  # the serving engine's placeholder block: never read as a state, never written


def step_rows(
    projections: Tensor,
    gate_bias: Tensor,
    reads: Tensor,
    state_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    initial_states: Tensor | None,
    initial_slot: Tensor | None,
    write_enabled: Tensor | None,
    last_states: Tensor | None,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
) -> None:
    """Advance all rows of a batch in place; arguments as in ``op.delta_rule_paged``."""
    states = _PagedStates(
        state_cache, block_table.numpy(), initial_states, last_states, spec, block_size, tokens_per_state
    )
    starts, lengths = query_start_loc.numpy(), seq_lens.numpy()
    slots = None if initial_slot is None else initial_slot.numpy()
    frozen = None if write_enabled is None else write_enabled.numpy() == 0
    rows, tokens = np.arange(len(lengths)), slice(0, len(lengths))
    if max_query_len > 1 or starts[-1] < len(rows):  # not simply one token a row
        queries = starts[1:] - starts[:-1]
        for row in np.flatnonzero(queries > 1).tolist():
            begin, end, one = int(starts[row]), int(starts[row + 1]), np.array([row])
            inputs = activate(projections[begin:end].float(), gate_bias, spec)
            held = frozen is not None and bool(frozen[row])
            _scan_row(inputs, reads[begin:end], states, one, lengths[one], _pick(slots, one), held)

        rows = np.flatnonzero(queries == 1)
        tokens = torch.from_numpy(starts[rows]).long()
        lengths, slots, frozen = lengths[rows], _pick(slots, rows), _pick(frozen, rows)
    if len(rows):
        inputs = activate(projections[tokens].float(), gate_bias, spec)
        reads[tokens] = _step(inputs, states, rows, lengths, slots, frozen)


def _step(
    inputs: DeltaRuleInputs,
    states: _PagedStates,
    rows: np.ndarray,
    lengths: np.ndarray,
    slots: np.ndarray | None,
    frozen: np.ndarray | None,
) -> Tensor:
    """One token of each of these rows. inputs: [n, H, r]; returns the reads [n, H*r]."""
    q, k, v, keep, erase, write = inputs
    positions = lengths - 1
    state = states.load(rows, positions, slots)  # [n, H, r, r]
    seen = state @ torch.stack([q, k], dim=-1)  # S q and S k, [n, H, r, 2]
    change = write * v - erase * seen[..., 1]
    after = torch.addcmul(keep.unsqueeze(-1) * state, change.unsqueeze(-1), k.unsqueeze(-2))
    if frozen is not None and frozen.any():
        after = torch.where(torch.from_numpy(frozen).view(-1, 1, 1, 1), state, after)
    states.save(rows, positions, after)
    states.save_last(slots, lengths, after)
    return seen[..., 0].flatten(1)


def _scan_row(
    inputs: DeltaRuleInputs,
    reads: Tensor,
    states: _PagedStates,
    row: np.ndarray,
    length: np.ndarray,
    slot: np.ndarray | None,
    frozen: bool,
) -> None:
    """All tokens of one row. inputs: [T, H, r]; reads: [T, H*r], written; row, length, slot: arrays of one element."""
    span, tokens = states.tokens_per_state, inputs.q.shape[0]
    computed = length - tokens
    lead = int(computed[0]) % span  # tokens of the first span that earlier steps processed
    spans = -(-(lead + tokens) // span)
    state = states.load(row, computed, slot)  # [1, H, r, r]
    if frozen:
        seen, final, ends = torch.einsum("hij,thj->thi", state[0], inputs.q), state, state.expand(spans, -1, -1, -1)
    else:
        padded = (F.pad(x, (0, 0, 0, 0, lead, 0), value=float(name == "keep")) for name, x in inputs._asdict().items())
        batch = DeltaRuleInputs(*(x.unsqueeze(0) for x in padded))
        seen, final, ends = scan_with_states(batch, state, span, _chunk_size(span))
        seen, ends = seen[0, lead:], torch.cat([ends[0], final])[:spans]
    reads.copy_(seen.flatten(1))
    states.save(row, computed - lead + np.arange(spans) * span, ends)
    states.save_last(slot, length, final)


def _chunk_size(span: int) -> int:
    """The scan's chunk for spans of this many tokens: about 16, and a multiple or a divisor of the span."""
    return 16 // span * span if span < 8 else max(size for size in range(1, 33) if span % size == 0)


def _pick(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]


@dataclass
class _PagedStates:
    """Loads and stores whole states by row and position: one call's view of the caller's tensors."""

    cache: Tensor
    block_table: np.ndarray
    initial: Tensor | None
    last: Tensor | None
    spec: DeltaRuleSpec
    block_size: int
    tokens_per_state: int

    def _cells(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and cell of each position, int32; indexing takes them as they are."""
        return self.block_table[
            rows, positions // self.block_size
        ], positions % self.block_size // self.tokens_per_state

    def load(self, rows: np.ndarray, computed: np.ndarray, slots: np.ndarray | None) -> Tensor:
        """States of rows that have ``computed`` tokens behind them, [n, H, r, r] (a copy)."""
        blocks, cells = self._cells(rows, np.maximum(computed - 1, 0))
        state = self.cache[torch.from_numpy(blocks), torch.from_numpy(cells)]
        fresh = computed == 0
        if fresh.any() or blocks.min() == NULL_BLOCK:
            state[torch.from_numpy(fresh | (blocks == NULL_BLOCK))] = 0
            if self.initial is not None:
                start = fresh & (slots >= 0)
                state[torch.from_numpy(start)] = self.initial[torch.from_numpy(slots[start])]
        return state.view(-1, self.spec.heads, self.spec.rank, self.spec.rank)

    def save(self, rows: np.ndarray, positions: np.ndarray, states: Tensor) -> None:
        """Store states [n, H, r, r] into the cells of these positions."""
        blocks, cells = self._cells(rows, positions)
        states = states.flatten(1)
        if blocks.min() == NULL_BLOCK:
            real = blocks != NULL_BLOCK
            blocks, cells, states = blocks[real], cells[real], states[torch.from_numpy(real)]
        self.cache[torch.from_numpy(blocks), torch.from_numpy(cells)] = states

    def save_last(self, slots: np.ndarray | None, lengths: np.ndarray, states: Tensor) -> None:
        """Store the states after rows' last tokens into the ring of their session slot."""
        if self.last is None or slots.max() < 0:
            return
        real = np.flatnonzero(slots >= 0)
        ring = torch.from_numpy(slots[real]), torch.from_numpy((lengths[real] - 1) % 2)
        self.last[ring] = states.flatten(1)[torch.from_numpy(real)]
