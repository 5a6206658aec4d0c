"""Picks few of many cases, so that every two values of two fields still meet in one of them.

Most faults of a configuration need one value or a pair of them (Kuhn, Wallace, Gallo, "Software Fault Interactions and
Implications for Software Testing", IEEE TSE 30(6), 2004, table 1), so the others wait for the full sweep.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

CaseT = TypeVar("CaseT", bound=tuple)


def pairwise(cases: Sequence[CaseT]) -> list[CaseT]:
    """The cases that a greedy choice takes, in their order: any pair of values that is in ``cases`` is in one of these.

    cases: tuples of one length, of hashable values. Example::

        pairwise([(a, b, c) for a in "xy" for b in "xy" for c in "xy"])  # 4 of the 8
    """
    missing = set().union(*map(_pairs, cases))
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda index: (len(_pairs(cases[index]) & missing), -index))
        chosen.add(best)
        missing -= _pairs(cases[best])
    return [case for index, case in enumerate(cases) if index in chosen]


def pairs(axes: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrise a test over the product of some axes; the cases that no pair of values needs are slow.

    axes: by the name of a parameter its values, or by several names, with commas between, tuples. Example::

        @pairs({"mode": ["max", "sum"], "heads,size": [((4, 2), 64), ((8, 1), 128)]})
        def test_every_shape(mode, heads, size): ...
    """
    every = list(itertools.product(*axes.values()))
    few = set(pairwise(every))
    params = []
    for case in every:
        values = [x for names, value in zip(axes, case, strict=True) for x in (value if "," in names else [value])]
        params.append(pytest.param(*values, marks=[] if case in few else [pytest.mark.slow]))
    return pytest.mark.parametrize(",".join(axes), params)


def _pairs(case: tuple) -> set[tuple[tuple[int, Hashable], tuple[int, Hashable]]]:
    return set(itertools.combinations(enumerate(case), 2))
