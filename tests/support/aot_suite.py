"""Compiles an op's cases ahead of time, in two processes: few of them in ``make test``, all in ``make test-all``."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic

import pytest

from tests.support.aot import Resources
from tests.support.pairwise import CaseT, pairwise

needs_the_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


class Suite(Generic[CaseT]):
    """An op's cases, each a named tuple, and what came out of compiling them.

    compile_case: at the top of its module, since other processes run it. always: cases that ``make test`` compiles
    besides those that cover every pair of values. Example::

        suite = Suite(compile_case, [Case("sm80", 64), Case("sm90", 64)])

        @suite.each
        def test_compiles_within_budget(case):
            check_budget(suite[case], registers=128, shared=48 << 10)
    """

    def __init__(
        self, compile_case: Callable[[CaseT], Resources], cases: Sequence[CaseT], always: Sequence[CaseT] = ()
    ) -> None:
        self._compile, self._results = _Guarded(compile_case), {}
        few = {*pairwise(cases), *always}
        self._parts = [[case for case in cases if case in few], [case for case in cases if case not in few]]
        self.each = self.of(lambda case: True)

    def of(self, wanted: Callable[[CaseT], bool]) -> pytest.MarkDecorator:
        """Parametrizes a test over the cases that are ``wanted``; those that no pair of values needs are slow."""
        params = [
            pytest.param(case, id="-".join(map(str, case)).replace("torch.", ""), marks=[pytest.mark.slow] * slow)
            for slow, part in enumerate(self._parts)
            for case in part
            if wanted(case)
        ]
        return pytest.mark.parametrize("case", params)

    def __getitem__(self, case: CaseT) -> Resources | str:
        """What a case takes, or the error of compiling it: Triton's do not pickle."""
        if case not in self._results:
            part = self._parts[case not in self._parts[0]]
            with ProcessPoolExecutor(2, mp_context=_context()) as pool:
                self._results |= zip(part, pool.map(self._compile, part, chunksize=4), strict=True)
        return self._results[case]


@dataclass(frozen=True)
class _Guarded:
    compile_case: Callable[..., Resources]

    def __call__(self, case: Any) -> Resources | str:
        try:
            return self.compile_case(case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _context() -> Any:
    """Processes forked from one that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "tests.support.aot"])
    return context
