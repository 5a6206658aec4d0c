"""``attention_inputs`` on the CPU against the fp64 oracle, and its checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mem_triton.ops.attention_inputs import attention_inputs
from mem_triton.ops.delta_rule import DeltaRuleSpec
from tests.ops.inputs_case import InputsCase, assert_inputs_match, make_inputs


def run(case: InputsCase, **changed) -> InputsCase:
    after, states = case.clone(), case.states
    arguments = {
        "qkv": after.projected[:, : case.inputs.width],
        "projections": after.projections,
        "reads": after.states.reads,
        "inputs": case.inputs,
        "batch": after.batch(),
        "spec": states.spec,
        "block_size": states.block_size,
        "tokens_per_state": states.tokens_per_state,
        "max_query_len": states.max_query_len,
        "rounded": after.rounded,
    }
    attention_inputs(**{**arguments, **changed})
    return after


@pytest.mark.parametrize("queries,computed", [([1, 1, 0, 1], [3, 8, 5, 0]), ([6, 1, 0, 9], [3, 8, 5, 0]), ([0], [2])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corrects,norms,rotated", [("q", True, 16), ("qkv", False, 8), ("", True, 0), ("v", False, 0)])
def test_against_the_oracle(queries, computed, dtype, corrects, norms, rotated):
    case = make_inputs(
        DeltaRuleSpec(8, 2),
        queries,
        computed,
        corrects=corrects,
        norms=norms,
        rotated=rotated,
        dtype=dtype,
        interleaved=norms,
        slots=[0, -1, 2, 1][: len(queries)],
        padding_tokens=2,
    )
    assert_inputs_match(run(case), case)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: {"qkv": c.projected[:, :5]}, r"^qkv: shape \(4, 5\), expected 4 tokens x at least 128 columns"),
        (lambda c: {"qkv": c.projected[:3]}, "^qkv: shape"),
        (lambda c: {"qkv": c.projected.double()}, "^qkv: dtype torch.float64"),
        (lambda c: {"qkv": c.projected.T.contiguous().T}, "^qkv: the columns must be contiguous"),
        (lambda c: {"rounded": c.rounded[:3]}, r"^rounded: shape \(3, 8\), expected a contiguous one of at least 4"),
        (lambda c: {"rounded": c.rounded[:, 1:]}, "^rounded: shape"),
        (lambda c: {"projections": c.projections[:, 1:]}, "^projections: shape"),
        (lambda c: {"inputs": replace(c.inputs, corrects="kq")}, "^inputs.corrects: 'kq'"),
        (lambda c: {"inputs": replace(c.inputs, corrects="qk")}, r"^inputs.delta: shape \(64, 8\)"),
        (lambda c: {"inputs": replace(c.inputs, delta=None)}, "^inputs.delta: None"),
        (lambda c: {"inputs": replace(c.inputs, q_norm=torch.ones(8))}, "^inputs.q_norm: shape"),
        (lambda c: {"inputs": replace(c.inputs, cos_sin=torch.ones(9, 32))}, "^inputs.cos_sin: 32 columns"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = make_inputs(DeltaRuleSpec(8, 1), [3, 1], [0, 5])
    with pytest.raises(ValueError, match=message):
        run(case, **change(case))
