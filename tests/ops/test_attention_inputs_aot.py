"""The kernel between projection and attention compiles for the GPUs we name, within its registers, without a spill."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from mem_triton.ops.attention_inputs import HeadInputs
from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch
from tests.support.aot import TARGETS, Resources, check_traffic, compile_for, types_of
from tests.support.aot_suite import (  # noqa: F401
    Budget,
    Suite,
    pytest_generate_tests,
    pytestmark,
    test_compiles_within_budget,
)

LAYERS = {  # query heads, KV heads, head size, norms, corrected parts, state
    "qwen3-4b": (32, 8, 128, True, "q", DeltaRuleSpec(8, 1)),
    "llama3-8b": (32, 8, 128, False, "qkv", DeltaRuleSpec(8, 4)),
    "d80-r32": (40, 8, 80, False, "qv", DeltaRuleSpec(32, 1)),
}
REGISTERS = {"qwen3-4b": 104, "llama3-8b": 128, "d80-r32": 168}
OCCUPANCY = {"qwen3-4b": 16, "llama3-8b": 16, "d80-r32": 12}  # warps at a time


class Case(NamedTuple):
    layer: str
    step: bool  # decode in one launch, else after the delta rule's own kernels
    target: str


CASES = list(itertools.starmap(Case, itertools.product(LAYERS, (True, False), TARGETS)))


def arguments(case: Case) -> dict[str, Any]:
    """The kernel's arguments as the launcher makes them, on small tensors of the right types and strides."""
    from mem_triton.ops.attention_inputs import launch

    heads, kv_heads, size, norms, corrects, spec = LAYERS[case.layer]
    bf16 = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)  # noqa: E731
    i32 = lambda *shape: torch.zeros(*shape, dtype=torch.int32)  # noqa: E731
    rows = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs = HeadInputs(
        heads,
        kv_heads,
        size,
        corrects,
        bf16(sum(rows[x] for x in corrects) * size, spec.read_width),
        bf16(size) if norms else None,
        bf16(size) if norms else None,
        cos_sin=bf16(4, size),
    )
    states = torch.zeros(2, spec.state_size)
    batch = StateBatch(
        torch.zeros(spec.bias_width),
        states.view(2, 1, -1),
        i32(1, 1),
        i32(2),
        i32(1),
        states,
        i32(1),
        i32(1),
        torch.zeros(2, 2, spec.state_size),
    )
    projected = bf16(1, inputs.width + -(-spec.projection_width // 16) * 16)
    return launch.kernel_arguments(
        projected,
        projected[:, inputs.width :],
        torch.zeros(1, spec.read_width),
        bf16(1, spec.read_width),
        inputs,
        batch,
        spec,
        16,
        16,
        i32(1) if case.step else None,
    )


def compile_case(case: Case) -> Resources:
    from mem_triton.ops.attention_inputs import launch
    from mem_triton.ops.attention_inputs.kernels import inputs_kernel
    from mem_triton.ops.tuning.attention_inputs import warps

    values = arguments(case)
    types = {name: types_of(value, integer, name) for name, value in values.items()}
    constants = {name: types.pop(name) for name in list(types) if types[name] is None}
    count = warps(values["LAYER"].PAIR_BLOCK.value, values["LAYER"].ROWS.value)
    return compile_for(case.target, inputs_kernel, types, constants, num_warps=count, **launch.OPTIONS)


def integer(name: str, value: int) -> str:
    return "i32" if value % 16 or name == "num_rows" else "i32:16"


def budget_of(case: Case) -> Budget:
    return Budget(REGISTERS[case.layer], 48 << 10, OCCUPANCY[case.layer])


ALWAYS = [Case("llama3-8b", True, target) for target in ("sm90", "gfx942")]
suite = Suite(compile_case, CASES, budget_of, ALWAYS)


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_the_step_and_three_kinds_of_heads_read_what_they_must(target: str):
    """Static bytes count all three branches, of which a program takes one."""
    _, _, size, _, _, spec = LAYERS["llama3-8b"]
    state, head = spec.state_size * 4, size * 2
    token = (2 * spec.heads * spec.rank + 2 * spec.read_width) * 2  # q and k of each head, v and beta of each row
    least = {
        "qkv": (2 * 3 * head, 0),
        "inputs.delta": (3 * head * spec.read_width, 0),
        "inputs.cos_sin": (2 * head, 0),
        "projections": (token, 0),
        "batch.state_cache": (2 * state, 0),
        "batch.initial_states": (state, 0),
        "batch.last_states": (state, 0),
        "reads": (spec.read_width * 4, 0),
        "rounded": (spec.read_width * 2, 0),
    }
    check_traffic(suite[Case("llama3-8b", True, target)], least, turns=0, excess=1.25)
