"""The delta rule in exact chunk-parallel form, in plain torch: transformers and training.

A state's rows never mix (gates act per row, k is shared), so row i is a recurrence of its own. Inside a chunk of C
tokens, token t adds a multiple u_t of k_t to the row, and the row is

    s_t = W[t, 0] s_0 + sum_{j <= t} W[t, j] u_j k_j,        W[t, j] = keep_{j+1} ... keep_t

    u_t = write_t v_t - erase_t (s_{t-1} . k_t)              # linear in u_1 ... u_{t-1} and in s_0

so all u of a chunk come from one unit lower triangular solve, as an affine function of s_0; the chunk as a whole is an
affine map of the row, and only these maps are chained one after the other. W is built by multiplication, without a
logarithm or a division: a gate of exactly 0 or 1 is as exact as any other.

Cost per row: O(T C) for W, O(T C r) for the solve, T/C chained r x r products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.ops.delta_rule.reference import DeltaRuleInputs

CHUNK_SIZE = 16


def scan(
    inputs: DeltaRuleInputs, initial_state: Tensor | None = None, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of equally long sequences; differentiable, exact in fp64.

    inputs: tensors [B, T, H, r] in fp32 or fp64; a padding token has keep 1, erase 0, write 0.
    initial_state: [B, H, r, r], None = zeros. chunk_size: tokens solved at once.
    Returns reads [B, T, H, r] (before each token's write) and the final state [B, H, r, r].

    Example::

        reads, state = scan(activate(projections, gate_bias, spec))      # projections: [B, T, P]
        more, state = scan(activate(later, gate_bias, spec), state)
    """
    batch, tokens, heads, rank = inputs.q.shape
    if initial_state is None:
        initial_state = inputs.q.new_zeros(batch, heads, rank, rank)
    if tokens == 0:
        return inputs.q, initial_state

    chunks = -(-tokens // chunk_size)
    q, k, v, keep, erase, write = _split_chunks(inputs, chunks, chunk_size)  # [B, n, H, r, C]
    decay = _decay_products(keep)  # [B, n, H, r, C + 1, C + 1]
    before, end = decay[..., :-1, :], decay[..., -1, :]  # the row before each token; after the chunk

    solved = _solve_writes(before, k, v, erase, write)  # [B, n, H, r, C, 1 + r]
    pushed = (end[..., 1:].unsqueeze(-1) * k.mT.unsqueeze(-3)).mT @ solved  # [B, n, H, r, r, 1 + r]
    transfer = torch.diag_embed(end[..., :1].expand_as(pushed[..., 0])) - pushed[..., 1:]  # row -> row
    starts, final = _chain(transfer, pushed[..., :1], initial_state)  # [B, n, H, r, r], [B, H, r, r]

    writes = solved[..., 0] - (solved[..., 1:] @ starts.unsqueeze(-1)).squeeze(-1)  # u, [B, n, H, r, C]
    seen = before[..., 1:] * (q.mT @ k).unsqueeze(-3)  # weight of u_j in read t
    reads = before[..., 0] * (starts @ q) + (seen @ writes.unsqueeze(-1)).squeeze(-1)
    return reads.permute(0, 1, 4, 2, 3).reshape(batch, chunks * chunk_size, heads, rank)[:, :tokens], final


def _split_chunks(inputs: DeltaRuleInputs, chunks: int, chunk_size: int) -> DeltaRuleInputs:
    """[B, T, H, r] -> [B, n, H, r, C]; the last chunk is filled up with tokens that neither read nor write."""
    missing = chunks * chunk_size - inputs.q.shape[1]
    padded = (F.pad(x, (0, 0, 0, 0, 0, missing), value=float(name == "keep")) for name, x in inputs._asdict().items())
    return DeltaRuleInputs(*(x.unflatten(1, (chunks, chunk_size)).permute(0, 1, 3, 4, 2) for x in padded))


def _decay_products(keep: Tensor) -> Tensor:
    """W[t, j] = keep_{j+1} ... keep_t for 0 <= j <= t <= C, else 0; [..., C] -> [..., C + 1, C + 1]."""
    size = keep.shape[-1] + 1
    unit = torch.eye(size, dtype=keep.dtype, device=keep.device)
    rows = [unit[0].expand(*keep.shape[:-1], size)]
    for t, gate in enumerate(keep.unbind(-1), start=1):
        rows.append(rows[-1] * gate.unsqueeze(-1) + unit[t])
    return torch.stack(rows, dim=-2)


def _solve_writes(before: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor) -> Tensor:
    """u as an affine function of the row at the chunk's start: [..., C, 1 + r], u = column 0 - columns 1: @ s_0."""
    system = erase.unsqueeze(-1) * before[..., 1:] * (k.mT @ k).unsqueeze(-3)  # strictly lower triangular
    from_start = (erase * before[..., 0]).unsqueeze(-1) * k.mT.unsqueeze(-3)
    right = torch.cat([(write * v).unsqueeze(-1), from_start], dim=-1)
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _chain(transfer: Tensor, push: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Chain the chunks' maps. transfer: [B, n, H, r, r, r]; push: [B, n, H, r, r, 1]; state: [B, H, r, r].

    Returns the state at each chunk's start [B, n, H, r, r] and after the last chunk.
    """
    shape, rank = state.shape, state.shape[-1]
    row = state.reshape(-1, rank, 1)
    starts = []
    for step, offset in zip(transfer.transpose(0, 1).flatten(1, 3), push.transpose(0, 1).flatten(1, 3), strict=True):
        starts.append(row)
        row = torch.baddbmm(offset, step, row)
    return torch.stack(starts).view(-1, *shape).transpose(0, 1), row.view(shape)
