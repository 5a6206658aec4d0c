"""The long-term memory behind a pool (M+, arXiv 2502.00592, section 3.2): what a pool drops can be read again.

Rows that a pool drops are kept with the retriever's keys, and after some updates they join the long-term rows, whose
frequencies decay until they are forgotten. Ages count rows written since a row was dropped; a row in the pool keeps the
age that it was written with, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mem_triton.systems.memoryllm.shape import LongTermShape, PoolShape
from mem_triton.systems.memoryllm.update import UpdateStep

FORGOTTEN = 0.01
"""Frequencies that are not above this have decayed; the authors' bound for what rounding leaves of 0."""


@dataclass(frozen=True)
class LongTermRows:
    """Rows of one layer that were dropped together.

    content: tensors [n, ...] of what is read of them. keys: [n, K], the retriever's. stamps: int64 [n], ages less the
    clock at which they were taken. frequencies: float64 [n].
    """

    content: tuple[Tensor, ...]
    keys: Tensor
    stamps: Tensor
    frequencies: Tensor

    def __len__(self) -> int:
        return len(self.stamps)

    def kept(self, mask: Tensor) -> Self:
        """Those of a mask [n]; the same object if that is all."""
        if bool(mask.all()):
            return self
        return type(self)(
            tuple(x[mask] for x in self.content), self.keys[mask], self.stamps[mask], self.frequencies[mask]
        )


Layers = tuple[tuple[LongTermRows, ...], ...]
"""Rows of each layer, in order."""


@dataclass(frozen=True)
class LongTerm:
    """One version's. Versions share what they have in common; nothing is changed.

    clock: rows of a layer that were dropped so far. ages: int64 [L, N] and keys: [L, N, K] of the rows in the pool.
    merged: the long-term rows; fresh: those that were dropped since the last merge.
    Example::

        after = long.dropping(step.dropped, contents, step.keys, shape)
        keys, values = gather(after.rows(layer), after.chosen(layer, queries, shape.read))
    """

    clock: int
    ages: Tensor
    keys: Tensor
    merged: Layers
    fresh: Layers

    def count(self, layer: int) -> tuple[int, int]:
        """Merged and fresh rows of a layer."""
        return sum(map(len, self.merged[layer])), sum(map(len, self.fresh[layer]))

    def rows(self, layer: int) -> tuple[LongTermRows, ...]:
        """All rows of a layer that can be read, the merged ones first."""
        return self.merged[layer] + self.fresh[layer]

    def ages_of(self, layer: int) -> Tensor:
        """int64: of ``rows``."""
        return _joined([part.stamps for part in self.rows(layer)]) + self.clock

    def chosen(self, layer: int, queries: Tensor, read: int) -> Tensor:
        """The rows of a layer that a prompt reads, as ``pick`` gives them. queries: [T, K] of all its tokens."""
        merged = self.count(layer)[0]
        scores = None if merged < read else scores_of(queries, [part.keys for part in self.rows(layer)]).cpu()
        return pick(scores, self.ages_of(layer), merged, read)

    def dropping(
        self, dropped: Tensor, contents: Sequence[tuple[Tensor, ...]], keys: Tensor, shape: LongTermShape
    ) -> Self:
        """After an update. dropped: int32 [L, n], rows of the pool that go, ascending; contents: of each layer's.

        keys: [L, n, K] of the rows that come.
        """
        count = dropped.shape[1]
        clock, index = self.clock + count, dropped.long()
        kept = torch.ones_like(self.ages, dtype=torch.bool).scatter_(1, index, False)
        survivors = self.ages.shape[1] - count
        new = torch.arange(count - 1, -1, -1).expand(len(index), -1)
        fresh = tuple(
            (
                *self.fresh[layer],
                LongTermRows(
                    contents[layer],
                    self.keys[layer][index[layer]],
                    self.ages[layer][index[layer]] - clock,
                    torch.full((count,), shape.first, dtype=torch.float64),
                ),
            )
            for layer in range(len(index))
        )
        after = type(self)(
            clock,
            torch.cat([self.ages[kept].view(-1, survivors), new], 1),
            torch.cat([self.keys[kept].view(len(index), survivors, -1), keys.to(self.keys)], 1),
            self.merged,
            fresh,
        )
        return after.merging(shape) if sum(map(len, after.fresh[0])) >= shape.merge else after

    def merging(self, shape: LongTermShape) -> Self:
        """Merge the fresh rows into the others; a layer drops what has decayed if enough is left to be read."""
        return replace(
            self,
            merged=tuple(_decayed(self.rows(layer), shape) for layer in range(len(self.merged))),
            fresh=tuple(() for _ in self.merged),
        )


def _decayed(rows: tuple[LongTermRows, ...], shape: LongTermShape) -> tuple[LongTermRows, ...]:
    rows = tuple(replace(part, frequencies=part.frequencies - shape.decay) for part in rows)
    masks = [part.frequencies > FORGOTTEN for part in rows]
    if sum(int(mask.sum()) for mask in masks) > shape.read:
        return tuple(part.kept(mask) for part, mask in zip(rows, masks, strict=True) if bool(mask.any()))
    return tuple(replace(part, frequencies=part.frequencies + shape.decay) for part in rows)


@dataclass(frozen=True)
class PoolState:
    """A version in memory. rows: [L, N, d], None for version 0; link: the chain's hash at it. long_term: of M+."""

    version: int
    rows: Tensor | None
    generator: Tensor
    link: str
    long_term: LongTerm | None = None


def long_term_after(rows: Tensor | None, long: LongTerm | None, step: UpdateStep, shape: PoolShape) -> LongTerm | None:
    """What a step makes of the long-term memory behind rows [L, N, d] as they are before it; None for MemoryLLM."""
    if long is None:
        return None
    contents = [(layer[index],) for layer, index in zip(rows, step.dropped.long(), strict=True)]
    return long.dropping(step.dropped, contents, step.keys, shape.long_term)


def scores_of(queries: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Score each row for a prompt: [n]. queries: [T, K] of all its tokens; keys: [.., K] each, n together."""
    return torch.cat([(queries @ part.to(queries).transpose(-2, -1)).sigmoid().mean(0) for part in keys])


def pick(scores: Tensor | None, ages: Tensor, merged: int, read: int) -> Tensor:
    """The rows that a prompt reads, int64 [read], in the order in which they stand before it: the oldest first.

    scores: of all rows; None where there are fewer merged ones than are read: then these are repeated, and the first
    copy is the one that is cut. ages: of all rows. Rows of the same age stand in descending order.
    """
    if merged < read:
        copies = -(-read // merged)
        chosen = torch.arange(merged, device=ages.device).repeat(copies)[-read:]
    else:
        chosen = scores.topk(read).indices.sort()[0].to(ages.device)
    return chosen[torch.argsort(ages[chosen], stable=True).flip(0)]


def gather(rows: Sequence[LongTermRows], chosen: Tensor) -> tuple[Tensor, ...]:
    """The content of chosen rows, [len(chosen), ...] each, without joining what is not chosen."""
    found: list[Tensor] = []
    starts = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0)
    where = torch.searchsorted(starts, chosen, right=True) - 1
    for i, sample in enumerate(rows[0].content):
        out = sample.new_empty(len(chosen), *sample.shape[1:])
        for place in where.unique().tolist():
            mine = where == place
            out[mine] = rows[place].content[i][chosen[mine] - starts[place]]
        found.append(out)
    return tuple(found)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.int64)
