"""A write into a pool: steps that are applied to its rows in memory, and then put on the disk as one version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from mem_triton.systems.memoryllm import records
from mem_triton.systems.memoryllm.long_term import PoolState, long_term_after
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton.systems.memoryllm.update import UpdateStep, draw_dropped, updated


class PoolWrite:
    """A write under way: rows as they will be, and nothing on the disk before ``commit``. Made by ``Pools.writing``.

    seed: draw as the authors' code does after ``torch.manual_seed(seed)``; the pool's own generator stays then.
    committing: entered for the commit, raises where there cannot be one. remember: gets the version that was committed.
    """

    def __init__(
        self,
        shape: PoolShape,
        folder: Path,
        state: PoolState,
        seed: int | None,
        committing: Callable[[], AbstractContextManager[None]],
        remember: Callable[[PoolState], None],
    ) -> None:
        self._shape, self._folder, self._before = shape, folder, state
        self._committing, self._remember = committing, remember
        self.rows, self.long_term, self.tokens = state.rows, state.long_term, 0
        self.steps: list[UpdateStep] = []
        self._own = torch.Generator()
        self._own.set_state(state.generator)
        self._draws = self._own if seed is None else torch.Generator().manual_seed(seed)

    @property
    def tail(self) -> Tensor | None:
        """The last ``tokens`` rows [L, tokens, d], which a write reads; None for a pool without rows."""
        return None if self.rows is None else self.rows[:, -self._shape.tokens :]

    def apply(self, delta: Tensor, tokens: int = 0, keys: Tensor | None = None) -> None:
        """Take new rows [L, n, d]. tokens: of the text that they are of. keys: [L, n, K], the retriever's, of M+.

        Raises PoolError for rows or keys that are none.
        """
        shape = self._shape
        delta = delta.detach().to("cpu", shape.torch_dtype).contiguous()
        if delta.ndim != 3 or (delta.shape[0], delta.shape[2]) != (shape.layers, shape.hidden):
            raise PoolError(f"delta: {list(delta.shape)}, expected [{shape.layers}, rows, {shape.hidden}]")
        if not 0 < delta.shape[1] <= shape.rows:
            raise PoolError(f"delta: {delta.shape[1]} rows, expected 1 to {shape.rows}")
        if not bool(delta.isfinite().all()):
            raise PoolError("delta: a row holds NaN or infinity, so nothing is written; look at the text and the model")
        keys = self._checked(keys, delta.shape[1])
        dropped = None
        if self.rows is not None:
            lists = shape.layers if shape.per_layer else 1
            dropped = draw_dropped(shape.rows, delta.shape[1], lists, self._draws)
        step = UpdateStep(delta, dropped, keys)
        self.long_term = long_term_after(self.rows, self.long_term, step, shape)
        self.rows = updated(self.rows, step, shape.rows)
        self.steps.append(step)
        self.tokens += tokens

    def commit(self) -> str:
        """Put the new version on the disk; its reference, "main@2". Raises BankError, and the pool stays as it is."""
        if not self.steps:
            raise PoolError("nothing was written; a text has at least one token")
        before, version, state = self._before, self._before.version + 1, self._own.get_state()
        with self._committing():
            link = records.write_delta(self._folder, version, self.steps, state, before.link, self.tokens)
            self._remember(PoolState(version, self.rows, state, link, self.long_term))
        return f"{self._folder.name.rpartition(':')[2]}@{version}"

    def _checked(self, keys: Tensor | None, count: int) -> Tensor | None:
        """The retriever's keys as they are stored. Raises PoolError."""
        shape, long = self._shape, self._shape.long_term
        expected = None if long is None else (shape.layers, count, long.keys)
        found = None if keys is None else tuple(keys.shape)
        if found != expected:
            raise PoolError(f"keys: {found}, expected {expected}: rows of M+ come with the retriever's, and no others")
        if keys is None:
            return None
        keys = keys.detach().to("cpu", shape.torch_dtype).contiguous()
        if not bool(keys.isfinite().all()):
            raise PoolError("keys: one holds NaN or infinity, so nothing is written; look at the text and the model")
        return keys
