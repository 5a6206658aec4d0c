"""The gated delta rule of δ-mem (arXiv 2605.12357, section 3), in plain torch: the specification.

Everything else in this folder (the vectorised torch path, the Triton kernels, the paged op) is compared with
this file. It runs in any float dtype, fp64 included, and walks tokens one by one, so it is slow on purpose.

Per state head, with an r x r state S (rows index the value, columns the key) and per-row gates:

    r_t = S_{t-1} q_t                                                       # read first
    S_t = diag(keep) S_{t-1} - diag(erase) (S_{t-1} k_t) k_t^T + diag(write) v_t k_t^T

Example::

    spec = DeltaRuleSpec(rank=8)
    inputs = activate(x @ w_down.T, gate_bias, spec)          # x: [T, hidden]
    reads, final, _ = delta_rule(inputs)                      # [T, 1, 8], [1, 1, 8, 8]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UpdateMode = Literal["standard", "lambda_outside", "no_lambda"]
MODES: dict[UpdateMode, int] = {"standard": 0, "lambda_outside": 1, "no_lambda": 2}
"""What compiled code calls them."""
L2_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DeltaRuleSpec:
    """Static shape and gate semantics of one adapter; hashable, so kernels specialise on it.

    rank: r, rows and columns of one state. heads: H, independent states per layer (MSW).
    rankwise_gates: one gate per row (G = H*r) or one per head (G = H).
    couple_lambda: lambda = 1 - beta; else lambda has a projection of its own.
    update_mode: (keep, erase, write) = standard (λ, β, β), lambda_outside (λ, λβ, β), no_lambda (1, β, β).
    normalize_qk: q and k become l2norm(tanh(.)); else they are used raw.
    """

    rank: int = 8
    heads: int = 1
    rankwise_gates: bool = True
    couple_lambda: bool = True
    update_mode: UpdateMode = "standard"
    normalize_qk: bool = True

    @property
    def read_width(self) -> int:
        """H*r: width of one token's read."""
        return self.heads * self.rank

    @property
    def gate_width(self) -> int:
        """G: number of gate values per token and gate."""
        return self.read_width if self.rankwise_gates else self.heads

    @property
    def bias_width(self) -> int:
        """Length of the gate bias: beta, then lambda if uncoupled."""
        return self.gate_width * (1 if self.couple_lambda else 2)

    @property
    def projection_width(self) -> int:
        """P: columns of the packed projection, laid out q | k | v | beta [| lambda]."""
        return 3 * self.read_width + self.bias_width

    @property
    def state_size(self) -> int:
        """H*r*r: floats in one layer's state."""
        return self.heads * self.rank * self.rank


class DeltaRuleInputs(NamedTuple):
    """Activated inputs of the recurrence, each [..., T, H, r]."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


def activate(
    projections: Tensor, gate_bias: Tensor, spec: DeltaRuleSpec, token_mask: Tensor | None = None
) -> DeltaRuleInputs:
    """Turn packed projections into the recurrence's inputs.

    projections: [..., T, P] = q | k | v | beta [| lambda], before any activation.
    gate_bias: [bias_width]. token_mask: bool [..., T]; a False token neither reads nor writes (padding).
    Computes in the dtype of ``projections``; pass fp32 or fp64. Source: delta-Mem ``delta_impl.py``, paper eq. 5-9.
    """
    n, g, per_head = spec.read_width, spec.gate_width, (spec.heads, spec.rank)
    qk = projections[..., : 2 * n].unflatten(-1, (2, *per_head))
    v = projections[..., 2 * n : 3 * n].unflatten(-1, per_head)
    if spec.normalize_qk:
        qk = F.normalize(torch.tanh(qk), dim=-1, eps=L2_NORM_EPS)
    q, k = qk.unbind(-3)
    gates = torch.sigmoid(projections[..., 3 * n :] + gate_bias.to(projections.dtype))

    def per_row(gate: Tensor) -> Tensor:  # [..., T, G] -> [..., T, H, r]
        return gate.unflatten(-1, per_head) if spec.rankwise_gates else gate.unsqueeze(-1).expand_as(v)

    beta = per_row(gates[..., :g])
    if spec.update_mode == "no_lambda":
        keep = torch.ones_like(beta)
    else:
        keep = 1 - beta if spec.couple_lambda else per_row(gates[..., g:])
    erase = keep * beta if spec.update_mode == "lambda_outside" else beta
    if token_mask is not None:
        dead = ~token_mask[..., None, None]
        q = q.masked_fill(dead, 0)  # a zero query reads zero
        keep, erase, beta = keep.masked_fill(dead, 1), erase.masked_fill(dead, 0), beta.masked_fill(dead, 0)
    return DeltaRuleInputs(q, k, v, keep, erase, beta)


def delta_rule(
    inputs: DeltaRuleInputs,
    initial_state: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    snapshot_every: int | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the recurrence token by token over a packed varlen batch.

    inputs: tensors [T, H, r], N sequences one after the other.
    initial_state: [N, H, r, r] or None (zeros). query_start_loc: int [N+1], None = one sequence.
    snapshot_every: also return, per sequence, the states after tokens n-1, 2n-1, ... as [T_i // n, H, r, r].
    Returns reads [T, H, r], final states [N, H, r, r], list of N snapshot tensors (empty tensors if not asked for).
    """
    total, heads, rank = inputs.q.shape
    starts = [0, total] if query_start_loc is None else query_start_loc.tolist()
    reads, finals, snapshots = torch.zeros_like(inputs.q), [], []
    for n, (begin, end) in enumerate(itertools.pairwise(starts)):
        state = inputs.q.new_zeros(heads, rank, rank) if initial_state is None else initial_state[n].to(inputs.q)
        taken = []
        for t in range(begin, end):
            q, k, v, keep, erase, write = (x[t].unsqueeze(-1) for x in inputs)  # [H, r, 1]
            reads[t] = (state @ q).squeeze(-1)
            state = keep * state - erase * (state @ k) * k.mT + write * v * k.mT
            if snapshot_every and (t - begin + 1) % snapshot_every == 0:
                taken.append(state)
        finals.append(state)
        snapshots.append(torch.stack(taken) if taken else state.new_zeros(0, heads, rank, rank))
    return reads, torch.stack(finals), snapshots
