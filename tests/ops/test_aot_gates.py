"""The gates on compiled kernels see what they are for: bytes of a kernel that is known, and of one that reads twice."""

from __future__ import annotations

import itertools

import pytest

from tests.support.aot import (
    TARGETS,
    Resources,
    check_no_padding,
    check_traffic,
    compile_for,
    programs_at_a_time,
)
from tests.support.aot_suite import needs_the_compiler
from tests.support.pairwise import pairwise
from tests.support.traffic import Bytes, read_traffic

pytestmark = [needs_the_compiler, pytest.mark.kernels]


def compile_sum(target: str, size: int = 64, width: int = 64, twice: bool = False, steps: int = 1) -> Resources:
    from tests.ops.gate_kernels import sum_rows

    arguments = {"x": "*bf16", "table": "*i32", "out": "*fp32", "rows": "i32"}
    constants = {"SIZE": size, "WIDTH": width, "TILE": 16, "TWICE": twice, "STEPS": steps}
    return compile_for(target, sum_rows, arguments, constants, num_warps=4, num_stages=3)


LEAST = {"x": (0, 4 * 64 * 2), "out": (64 * 4, 0)}


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_of_a_known_kernel(target: str):
    """Loops of both kinds; 16 lanes gather 4 rows through a table."""
    assert compile_sum(target, steps=3).traffic == {
        "x": Bytes(0, 3 * 4 * 64 * 2),
        "table": Bytes(0, 16),
        "out": Bytes(64 * 4, 0),
    }
    check_traffic(compile_sum(target), LEAST)


@pytest.mark.parametrize("target", ("sm90", "gfx942"))
def test_a_kernel_that_reads_twice_is_refused(target: str):
    with pytest.raises(AssertionError, match=r"x: \d+ bytes for"):
        check_traffic(compile_sum(target, twice=True), LEAST)


def test_a_read_that_goes_unnoticed_is_refused():
    with pytest.raises(AssertionError, match="keys: 0 bytes for"):
        check_traffic(compile_sum("sm90"), LEAST | {"keys": (0, 16)})


@pytest.mark.parametrize("target", ("sm90", "gfx942"))
def test_padding_moves_nothing_but_is_refused(target: str):
    padded = compile_sum(target, size=80, width=128)
    check_traffic(padded, {"x": (0, 4 * 80 * 2)})
    with pytest.raises(AssertionError, match="padding=384"):
        check_no_padding(padded)


def test_an_access_to_no_argument_is_an_error():
    with pytest.raises(ValueError, match="not traced to a pointer argument"):
        read_traffic("tt.func public @f(%x: i32) {\n%y = tt.load %z : tensor<4x!tt.ptr<f32>, #b>\n}", ["x"])


def test_occupancy_of_the_makers_tables():
    """Rows of NVIDIA's occupancy calculator for compute capability 9.0, and of AMD's for CDNA 3."""
    assert programs_at_a_time("sm90", 32, 0, 4) == 16  # 64 warps
    assert programs_at_a_time("sm90", 128, 0, 4) == 4
    assert programs_at_a_time("sm90", 168, 0, 4) == 3
    assert programs_at_a_time("sm90", 32, 100 * 1024, 4) == 2
    assert programs_at_a_time("sm90", 255, 0, 16) == 0
    assert programs_at_a_time("gfx942", 128, 0, 4) == 4
    assert programs_at_a_time("gfx942", 64, 32 * 1024, 4) == 2


def test_few_cases_hold_every_pair_of_values():
    cases = list(itertools.product("abc", "def", range(3), (True, False)))
    few = pairwise(cases)
    for first, second in itertools.combinations(range(4), 2):
        assert {(case[first], case[second]) for case in few} == {(case[first], case[second]) for case in cases}
    assert len(few) <= 12 and set(few) <= set(cases), few


def test_no_case_of_the_few_is_without_a_pair_of_its_own():
    """Negative control: with one case less some pair is missing, so the test above can fail."""
    few = pairwise(list(itertools.product("abc", "def", "gh")))
    pairs = [set(itertools.combinations(enumerate(case), 2)) for case in few]
    assert any(pair - set().union(*pairs[:i], *pairs[i + 1 :]) for i, pair in enumerate(pairs))
