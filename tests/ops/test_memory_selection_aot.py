"""The selection kernel compiles for the GPUs we name, within its registers, and reads what it must."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from tests.support.aot import TARGETS, Resources, compile_for
from tests.support.aot_suite import *  # noqa: F403
from tests.support.aot_suite import Budget, Suite

REGISTER_BUDGET = 255  # a reference's program is alone on its multiprocessor more often than not; spills would hurt
OCCUPANCY = 8  # warps at a time
SHARED_BUDGET = 100 * 1024  # what an sm_86 has, the smallest of those in use


class Case(NamedTuple):
    tokens: int
    head_dim: int
    dtype: str
    normalize: bool
    target: str


SHAPES = [
    (128, 80, "bf16", True),
    (128, 128, "fp16", False),
    (128, 128, "fp32", True),
    (512, 128, "bf16", True),
    (512, 128, "fp32", True),
]
CASES = [Case(*shape, target) for shape, target in itertools.product(SHAPES, TARGETS)]


def compile_case(case: Case) -> Resources:
    from mem_triton.ops.memory_selection import kernels, launch

    kernel = kernels.selection_weights_kernel
    constants = launch.constants(case.tokens, 4, case.head_dim, case.normalize, 4 if case.dtype == "fp32" else 2)
    types = {"q": f"*{case.dtype}", "k": f"*{case.dtype}", "valid": "*i8", "out": "*fp32", "scale": "fp32"}
    arguments = {name: types.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
    arguments["tokens"] = arguments["stride_valid"] = "i32"
    warps = launch.warps(case.tokens)
    return compile_for(case.target, kernel, arguments, constants, num_warps=warps, **launch.OPTIONS)


def budget_of(case: Case) -> Budget:
    """Keys come from the L1 cache again with every step of queries: logits of all tokens would not fit a program. The
    last step of channels may be masked in part, which only the kernel's loop counter tells."""
    from mem_triton.ops.memory_selection.launch import QUERIES

    item = 4 if case.dtype == "fp32" else 2
    channels = -(-case.head_dim * item // 64) * 64
    least = {"q": (0, QUERIES * channels), "k": (0, case.tokens * channels), "out": (case.tokens * 4, 0)}
    return Budget(REGISTER_BUDGET, SHARED_BUDGET, OCCUPANCY, least=least, matrix=(QUERIES, item))


suite = Suite(compile_case, CASES, budget_of)


def test_a_new_length_needs_no_new_kernel():
    from mem_triton.ops.memory_selection import kernels

    sizes = [p for p in kernels.selection_weights_kernel.params if p.name == "tokens"]
    assert sizes and all(p.do_not_specialize for p in sizes)
