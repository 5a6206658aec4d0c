"""Compiles an op's cases ahead of time, in two processes, and checks each: few of them in ``make test``, all in
``make test-all``.

One suite for every op. An op's file says what its cases are, how one is compiled and what may come out; the tests are
here, and the file imports all of them, or those that it has cases for::

    from tests.support.aot_suite import *
    from tests.support.aot_suite import Budget, Suite

    suite = Suite(compile_case, [Case("sm80", 64), Case("sm90", 64)], budget_of)
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic

import pytest

from tests.support.aot import (
    EXCESS,
    Resources,
    check_budget,
    check_matrix,
    check_no_padding,
    check_traffic,
)
from tests.support.pairwise import CaseT, pairwise

__all__ = [
    "pytest_generate_tests",
    "pytestmark",
    "test_compiles_within_budget",
    "test_reads_and_writes_what_it_must",
    "test_takes_the_widest_matrix_instruction",
]

needs_the_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
pytestmark = [needs_the_compiler, pytest.mark.kernels]


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may take, and what it has to do.

    registers, shared, occupancy, spills: see ``check_budget``. least: bytes that a program cannot do without, see
    ``check_traffic``, with its ``turns`` and ``excess``; None where no test counts them. pads: whether lanes may stand
    for channels that the head does not have. matrix: rows of a product and bytes of an element, None without products.
    """

    registers: int
    shared: int
    occupancy: int
    spills: int = 0
    least: Mapping[str, tuple[int, int]] | None = None
    turns: int = 16
    excess: float = EXCESS
    pads: bool = True
    matrix: tuple[int, int] | None = None


class Suite(Generic[CaseT]):
    """An op's cases, each a named tuple with a ``target``, and what came out of compiling them.

    compile_case: at the top of its module, since other processes run it. budget: of a case. always: cases that
    ``make test`` compiles besides those that cover every pair of values.
    """

    def __init__(
        self,
        compile_case: Callable[[CaseT], Resources],
        cases: Sequence[CaseT],
        budget: Callable[[CaseT], Budget],
        always: Sequence[CaseT] = (),
    ) -> None:
        self._compile, self._results, self.budget = _Guarded(compile_case), {}, budget
        few = {*pairwise(cases), *always}
        self._parts = [[case for case in cases if case in few], [case for case in cases if case not in few]]

    def of(self, wanted: Callable[[CaseT], bool]) -> list[Any]:
        """Parameters of a test, the cases that are ``wanted``; those that no pair of values needs are slow."""
        return [
            pytest.param(case, id="-".join(map(str, case)).replace("torch.", ""), marks=[pytest.mark.slow] * slow)
            for slow, part in enumerate(self._parts)
            for case in part
            if wanted(case)
        ]

    def __getitem__(self, case: CaseT) -> Resources | str:
        """What a case takes, or the error of compiling it: Triton's do not pickle."""
        if case not in self._results:
            part = self._parts[case not in self._parts[0]]
            with ProcessPoolExecutor(2, mp_context=_context()) as pool:
                self._results |= zip(part, pool.map(self._compile, part, chunksize=1), strict=True)
        return self._results[case]


WANTED: dict[str, Callable[[Budget], bool]] = {
    "test_compiles_within_budget": lambda budget: True,
    "test_reads_and_writes_what_it_must": lambda budget: budget.least is not None,
    "test_takes_the_widest_matrix_instruction": lambda budget: budget.matrix is not None,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise this file's tests over the cases of the module that imports them."""
    suite, wanted = metafunc.module.suite, WANTED.get(metafunc.function.__name__)
    if wanted is not None:
        cases = suite.of(lambda case: wanted(suite.budget(case)))
        metafunc.parametrize("suite,case", [pytest.param(suite, *p.values, id=p.id, marks=p.marks) for p in cases])


def test_compiles_within_budget(suite: Suite, case: Any) -> None:
    of = suite.budget(case)
    check_budget(suite[case], of.registers, of.shared, spills=of.spills, occupancy=of.occupancy)


def test_reads_and_writes_what_it_must(suite: Suite, case: Any) -> None:
    of = suite.budget(case)
    check_traffic(suite[case], of.least, of.turns, of.excess)
    if not of.pads:
        check_no_padding(suite[case])


def test_takes_the_widest_matrix_instruction(suite: Suite, case: Any) -> None:
    check_matrix(suite[case], case.target, *suite.budget(case).matrix)


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
