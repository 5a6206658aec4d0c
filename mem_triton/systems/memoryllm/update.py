"""How a pool takes new rows (MemoryLLM, arXiv 2402.04624, section 3.1.2): old ones are dropped by chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateStep:
    """One update. delta: [L, n, d], the new rows; dropped: int32 [1 or L, n], which go; None for a pool's first rows.

    One list of dropped rows is that of all layers. keys: [L, n, K] of M+, the retriever's keys of the new rows.
    """

    delta: Tensor
    dropped: Tensor | None
    keys: Tensor | None = None


def draw_dropped(rows: int, count: int, lists: int, generator: torch.Generator) -> Tensor:
    """int32 [lists, count] of ``rows`` rows, ascending: those that the authors' code drops under the same generator.

    It keeps the first ``rows - count`` of a permutation, drawn once, or once for each layer.
    """
    found = [torch.randperm(rows, generator=generator)[rows - count :].sort()[0] for _ in range(lists)]
    return torch.stack(found).to(torch.int32)


def updated(rows: Tensor | None, step: UpdateStep, total: int) -> Tensor:
    """The pool [L, total, d] after a step. rows: before it, None for one that has none yet.

    Survivors keep their order, and the new rows stand behind them. First rows are repeated until the pool is full.
    """
    delta = step.delta
    if rows is None:
        whole, rest = divmod(total, delta.shape[1])
        parts = [delta] * whole + ([delta[:, -rest:]] if rest else [])
        return torch.cat(parts, 1) if whole else delta[:, -total:].clone()
    kept = torch.ones(len(rows), total, dtype=torch.bool)
    kept.scatter_(1, step.dropped.long().expand(len(rows), -1), False)
    survivors = rows[kept].view(len(rows), total - delta.shape[1], -1)
    return torch.cat((survivors, delta.to(rows)), 1)
