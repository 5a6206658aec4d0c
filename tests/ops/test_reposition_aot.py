"""The reposition kernel compiles for the GPUs we name, within its registers, and reads what it must."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from tests.support.aot import TARGETS, Resources, compile_for
from tests.support.aot_suite import (  # noqa: F401
    Budget,
    Suite,
    pytest_generate_tests,
    pytestmark,
    test_compiles_within_budget,
    test_reads_and_writes_what_it_must,
)

REGISTER_BUDGET = 64  # eight programs of 128 threads fill a multiprocessor
OCCUPANCY = 32  # warps at a time, eight on each scheduler
SHARED_BUDGET = 8 * 1024  # to change the layout between 16-bit loads and fp32 arithmetic
PAGE_SIZE = 128


class Case(NamedTuple):
    head_dim: int
    rotary_dim: int
    variant: str
    target: str


SHAPES = [(80, 80), (128, 128), (96, 24), (256, 256), (64, 0)]  # head_dim, rotary_dim
CASES = [Case(*shape, "load", target) for shape, target in itertools.product(SHAPES, TARGETS)]
CASES += [Case(128, 128, "move", target) for target in ("sm90", "gfx942")]


def compile_case(case: Case) -> Resources:
    from mem_triton.ops.reposition import kernels, launch

    kernel, loading = kernels.reposition_kernel, case.variant == "load"
    constants = launch.constants(PAGE_SIZE, case.head_dim, case.rotary_dim, interleaved=not loading)
    if loading:
        constants["old_positions"] = None
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("pool", "source"):
            arguments[name] = "*bf16"
        elif name.startswith("stride_"):
            arguments[name] = "i32:16"
        else:
            arguments[name] = {"quarter_turns": "*fp64", "factor": "fp32"}.get(name, "*i32")
    return compile_for(case.target, kernel, arguments, constants, **launch.OPTIONS)


def budget_of(case: Case) -> Budget:
    from mem_triton.ops.reposition import launch

    fixed = launch.constants(PAGE_SIZE, case.head_dim, case.rotary_dim, interleaved=False)
    moved = fixed["TOKENS"] * case.head_dim * 2
    least = {"source": (moved, 0), "pool": (moved, 0)}
    if case.rotary_dim:
        least |= {"quarter_turns": (fixed["HALF"] * 8, 0), "positions": (fixed["TOKENS"] * 4, 0)}
    return Budget(REGISTER_BUDGET, SHARED_BUDGET, OCCUPANCY, least=least)


suite = Suite(compile_case, CASES, budget_of)
