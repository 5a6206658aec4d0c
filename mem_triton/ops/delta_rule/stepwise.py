"""The delta rule token by token for a batch of equally long sequences: fewer operations than the chunked form, but one
after the other, so it wins where the batch is wide. Differentiable; ``reference.py`` is its specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.delta_rule import chunked
from mem_triton.ops.delta_rule.reference import DeltaRuleInputs

WIDE_STATE = 4096
"""Floats of all states of a batch from which a token's own work outweighs its launch. On one CPU core, B=48, T=40, H=4,
r=8, forward and backward: 17 ms token by token, 41 ms chunked; B=1 and T=8192 is the other way round."""


def scan_tokens(inputs: DeltaRuleInputs, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``chunked.scan``: tensors [B, T, H, r], state [B, H, r, r] -> reads [B, T, H, r], final state."""
    batch, tokens, heads, rank = inputs.q.shape
    state = inputs.q.new_zeros(batch, heads, rank, rank) if initial_state is None else initial_state
    if tokens == 0:
        return inputs.q, state
    both = torch.stack([inputs.q, inputs.k], dim=-1).unbind(1)  # T x [B, H, r, 2]
    keys = inputs.k.unsqueeze(-2).unbind(1)  # T x [B, H, 1, r]
    v, keep, erase, write = (x.unsqueeze(-1).unbind(1) for x in (inputs.v, inputs.keep, inputs.erase, inputs.write))
    reads = []
    for t in range(tokens):
        seen = state @ both[t]  # S q, S k
        reads.append(seen[..., 0])
        state = keep[t] * state - (erase[t] * seen[..., 1:] - write[t] * v[t]) * keys[t]
    return torch.stack(reads, dim=1), state


def scan(inputs: DeltaRuleInputs, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the faster of the two forms on a CPU, chosen by shape alone; both are exact.

    inputs: tensors [B, T, H, r] in fp32 or fp64; a padding token has keep 1, erase 0, write 0.
    initial_state: [B, H, r, r], None = zeros.
    Returns reads [B, T, H, r] (before each token's write) and the final state [B, H, r, r].
    """
    batch, tokens, heads, rank = inputs.q.shape
    if tokens == 1 or batch * heads * rank**2 >= WIDE_STATE:
        return scan_tokens(inputs, initial_state)
    return chunked.scan(inputs, initial_state, chunk_size=max(1, min(tokens, chunked.CHUNK_SIZE)))
