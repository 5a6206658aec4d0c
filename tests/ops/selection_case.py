"""Random references for ``select_tokens``, and the specification applied to them in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mem_triton.ops.memory_selection import reference
from mem_triton.ops.memory_selection.reference import Mode


@dataclass
class SelectionCase:
    q: Tensor
    k: Tensor
    valid: Tensor | None
    scale: float
    mode: Mode

    @property
    def flags(self) -> Tensor:
        return torch.ones(self.q.shape[:2], dtype=torch.bool) if self.valid is None else self.valid


def make_case(
    lengths: list[int],
    tokens: int | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    prefix: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    mode: Mode = "softmax",
    seed: int = 0,
) -> SelectionCase:
    """References of ``lengths`` tokens behind a prefix that is not valid, padded with NaN to ``tokens``.

    size: of queries and keys; logits grow with its square. The tensors are views of wider ones.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = tokens or max(lengths) + prefix
    valid = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for row, length in zip(valid, lengths, strict=True):
        row[prefix : prefix + length] = True
    both = torch.randn(len(lengths), tokens, sum(heads), head_dim + 3, generator=g) * size
    both = torch.where(valid[:, :, None, None], both, torch.nan).to(dtype)[..., 2:-1]
    return SelectionCase(both[:, :, : heads[0]], both[:, :, heads[0] :], valid, head_dim**-0.5, mode)


def expected(case: SelectionCase) -> Tensor:
    """ln of the weights in fp64, [B, Hkv, T]."""
    rows = zip(case.q.double(), case.k.double(), case.flags, strict=True)
    return torch.stack([reference.log_weights(q, k, valid, case.scale, case.mode) for q, k, valid in rows])


def tolerance(case: SelectionCase) -> float:
    """What fp32 logits and sums may cost: a log weight is off by no more than its largest logit is, and a little."""
    q, k = (x.double().nan_to_num() for x in (case.q, case.k))
    largest = float(q.norm(dim=-1).max() * k.norm(dim=-1).max() * case.scale)
    return torch.finfo(torch.float32).eps * (16 + 8 * largest)


def assert_weights(weights: Tensor, case: SelectionCase) -> None:
    want = expected(case)
    assert torch.equal(weights == -torch.inf, want == -torch.inf)
    error = (weights.double() - want)[want > -torch.inf]
    assert error.abs().max() <= tolerance(case) if len(error) else True, f"{error.abs().max():.3g}"


def assert_picks(indices: Tensor, count: Tensor, case: SelectionCase, keep: int) -> None:
    """Ascending, valid, as many as there are, and none worse than a token left out, by more than the arithmetic."""
    want = expected(case)
    assert indices.dtype == count.dtype == torch.int32 and indices.shape == (*want.shape[:2], keep)
    assert count.tolist() == [min(keep, int(row.sum())) for row in case.flags]
    for row, heads in enumerate(indices.tolist()):
        for head, picks in enumerate(heads):
            kept, rest = picks[: int(count[row])], picks[int(count[row]) :]
            assert kept == sorted(set(kept)) and all(case.flags[row, j] for j in kept) and set(rest) <= {-1}
            left = [j for j in case.flags[row].nonzero()[:, 0].tolist() if j not in kept]
            if kept and left:
                assert want[row, head, kept].min() >= want[row, head, left].max() - 2 * tolerance(case)
