"""The kernel between projection and attention against the fp64 oracle, with memory watched."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.attention_inputs import launch
from mem_triton.ops.delta_rule import DeltaRuleSpec
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig
from tests.ops.inputs_case import InputsCase, assert_inputs_match, make_inputs
from tests.support.interp import sanitize

CONFIG = DeltaRuleConfig(max_recurrent=8, rows=8, warps=1, chunk=4, chunk_rows=4, chunk_warps=1)


def run(case: InputsCase, order: str = "forward", counter: torch.Tensor | None = None) -> InputsCase:
    """The case after the kernels ran on a copy of it; fails on any finding of the memory checker."""
    after, states = case.clone(), case.states
    counter = torch.zeros(len(states.seq_lens), dtype=torch.int32) if counter is None else counter
    with sanitize(order) as findings:
        launch.prepare(
            after.projected[:, : case.inputs.width],
            after.projections,
            after.states.reads,
            case.inputs,
            after.batch(),
            states.spec,
            states.block_size,
            states.tokens_per_state,
            states.max_query_len,
            after.rounded,
            counter,
            CONFIG,
        )
    assert not findings, "\n".join(findings)
    assert not counter.any(), "a replayed graph would find a counter that is not zero"
    return after


DECODE = ([1, 1, 0, 1, 1], [3, 8, 5, 0, 15])
MIXED = ([6, 1, 0, 9], [3, 8, 5, 0])


@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "corrects,norms,rotated",
    [("", True, 16), ("q", True, 16), ("qkv", True, 16), ("k", False, 16), ("qv", True, 0), ("v", False, 0)],
)
def test_corrections_norms_and_rotations(batch, corrects, norms, rotated):
    slots = [-1, 2, 3, 1, 0][: len(batch[0])]
    case = make_inputs(
        DeltaRuleSpec(8, 1),
        *batch,
        corrects=corrects,
        norms=norms,
        rotated=rotated,
        slots=slots,
        writes=[1, 0, 1, 1, 1][: len(batch[0])],
    )
    assert_inputs_match(run(case, "reverse"), case)


@pytest.mark.parametrize("batch", [([1, 1], [3, 8]), ([3, 1], [0, 8])], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "heads,rotated,interleaved",
    [
        ((4, 2, 16), 8, False),
        ((4, 1, 16), 8, True),
        ((2, 2, 80), 80, False),
        ((2, 1, 96), 48, False),
        ((3, 1, 64), 64, True),
        ((2, 1, 33), 32, False),
    ],
)
def test_every_head(batch, heads, rotated, interleaved):
    """Partial rotations, heads that are no power of two, an odd one, and neighbours as pairs."""
    case = make_inputs(
        DeltaRuleSpec(8, 1), *batch, heads=heads, rotated=rotated, interleaved=interleaved, corrects="qkv"
    )
    assert_inputs_match(run(case, "shuffle"), case)


@pytest.mark.parametrize("rank,heads", [(4, 1), (4, 3), (8, 4), (16, 2), (32, 1), (16, 4), (32, 2)])
def test_every_state(rank, heads):
    """The last two are too large for the one launch, and take two."""
    case = make_inputs(
        DeltaRuleSpec(rank, heads, couple_lambda=False), [1, 0, 1], [3, 5, 0], corrects="qv", slots=[0, 2, -1]
    )
    assert_inputs_match(run(case, "shuffle"), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
def test_dtypes(batch, dtype):
    case = make_inputs(DeltaRuleSpec(8, 1), *batch, dtype=dtype, corrects="qk", padding_tokens=2)
    assert_inputs_match(run(case), case)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(st.sampled_from([0, 1, 1, 3]), st.integers(0, 12)), min_size=1, max_size=4),
    decode=st.booleans(),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    rankwise=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batch(batch, decode, mode, rankwise, seed):
    pick = random.Random(seed)
    queries, computed = zip(*batch, strict=True)
    case = make_inputs(
        DeltaRuleSpec(8, 2, rankwise, update_mode=mode),
        [min(n, 1) for n in queries] if decode else list(queries),
        list(computed),
        corrects=pick.choice(["", "q", "qkv"]),
        seed=seed,
        padding_tokens=pick.choice([0, 2]),
        slots=pick.choice([None, pick.sample([-1, 0, 1, 2, 3], len(batch))]),
        writes=pick.choice([None, [pick.randint(0, 1) for _ in batch]]),
        null_rows=pick.choice([(), (0,)]),
    )
    assert_inputs_match(run(case, pick.choice(["forward", "reverse", "shuffle"])), case)


@pytest.mark.parametrize("batch", [([1, 1], [3, 0]), ([20, 6], [3, 0])], ids=["decode", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault16_rows_frozen_at_zeros_keep_every_bit_of_the_projection(batch, dtype):
    """What requests without a session have where the scope is sessions."""
    case = make_inputs(
        DeltaRuleSpec(8, 2), *batch, corrects="qkv", norms=False, rotated=0, dtype=dtype, slots=[-1, -1], writes=[0, 0]
    )
    case.states.state_cache.zero_()
    after, tokens = run(case), sum(batch[0])
    assert torch.equal(after.projected, case.projected)
    assert not after.states.reads[:tokens].any() and not after.rounded[:tokens].any()
    assert not after.states.state_cache.any()
    wrote = run(replace(case, states=replace(case.states, write_enabled=torch.ones(2, dtype=torch.int32))))
    assert wrote.states.state_cache.any(), "control: such rows have something to write"


def test_without_the_counter_a_head_would_read_the_new_state():
    """Control: the programs of a row may come in any order because the last one writes. Were each to write, the checker
    would see one overwrite what another still reads."""
    case = make_inputs(DeltaRuleSpec(8, 1), [1, 1], [3, 5], corrects="q")
    programs = case.inputs.touched()[1]
    counter = torch.full((2,), programs - 1, dtype=torch.int32)  # the first to come takes itself for the last
    with pytest.raises(AssertionError, match="race"):
        run(case, counter=counter)
