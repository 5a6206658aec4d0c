"""``attention_inputs`` against the fp64 oracle, wherever it runs, and its checks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.attention_inputs import attention_inputs
from mem_triton.ops.delta_rule import DeltaRuleSpec
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig
from tests.ops.inputs_case import InputsCase, assert_inputs_match, make_inputs
from tests.support.interp import sanitize
from tests.support.pairwise import pairs
from tests.support.places import device_of, everywhere, interpreted, on_gpu

CONFIG = DeltaRuleConfig(max_recurrent=8, rows=8, warps=1, chunk=4, chunk_rows=4, maps_warps=1)
TOLERANCE = {"cpu": 5e-6, "interpreter": 2e-6, "gpu": 1e-5}


def call(case: InputsCase, **changed) -> None:
    """The op, in place."""
    states = case.states
    arguments = {
        "qkv": case.projected[:, : case.inputs.width],
        "projections": case.projections,
        "reads": states.reads,
        "inputs": case.inputs,
        "batch": case.batch(),
        "spec": states.spec,
        "block_size": states.block_size,
        "tokens_per_state": states.tokens_per_state,
        "max_query_len": states.max_query_len,
        "rounded": case.rounded,
    }
    attention_inputs(**{**arguments, **changed})


def run(
    case: InputsCase, place: str = "cpu", order: str = "forward", counter: torch.Tensor | None = None
) -> InputsCase:
    """The runner: the case after the op ran on a copy of it. In the interpreter no finding may be made."""
    after, states = case.clone().to(device_of(place)), case.states
    if place != "interpreter":
        call(after)
        return after.to("cpu")
    from mem_triton.ops.attention_inputs import launch

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


def check(case: InputsCase, place: str, order: str = "forward") -> None:
    assert_inputs_match(run(case, place, order), case, TOLERANCE[place])


DECODE = ([1, 1, 0, 1, 1], [3, 8, 5, 0, 15])
MIXED = ([6, 1, 0, 9], [3, 8, 5, 0])


@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "corrects,norms,rotated",
    [("", True, 16), ("q", True, 16), ("qkv", True, 16), ("k", False, 16), ("qv", True, 0), ("v", False, 0)],
)
@everywhere
def test_corrections_norms_and_rotations(place, batch, corrects, norms, rotated):
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
    check(case, place, "reverse")


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
@everywhere
def test_every_head(place, batch, heads, rotated, interleaved):
    """Partial rotations, heads that are no power of two, an odd one, and neighbours as pairs."""
    case = make_inputs(
        DeltaRuleSpec(8, 1), *batch, heads=heads, rotated=rotated, interleaved=interleaved, corrects="qkv"
    )
    check(case, place, "shuffle")


@pytest.mark.parametrize("rank,heads", [(4, 1), (4, 3), (8, 4), (16, 2), (32, 1), (16, 4), (32, 2)])
@everywhere
def test_every_state(place, rank, heads):
    """The last two are too large for the one launch, and take two."""
    case = make_inputs(
        DeltaRuleSpec(rank, heads, couple_lambda=False), [1, 0, 1], [3, 5, 0], corrects="qv", slots=[0, 2, -1]
    )
    check(case, place, "shuffle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
@everywhere
def test_dtypes(place, batch, dtype):
    case = make_inputs(DeltaRuleSpec(8, 1), *batch, dtype=dtype, corrects="qk", padding_tokens=2)
    check(case, place)


@pytest.mark.parametrize("batch", [([1, 1], [3, 0]), ([20, 6], [3, 0])], ids=["decode", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@everywhere
def test_fault16_rows_frozen_at_zeros_keep_every_bit_of_the_projection(place, batch, dtype):
    """What requests without a session have where the scope is sessions."""
    case = make_inputs(
        DeltaRuleSpec(8, 2), *batch, corrects="qkv", norms=False, rotated=0, dtype=dtype, slots=[-1, -1], writes=[0, 0]
    )
    case.states.state_cache.zero_()
    after, tokens = run(case, place), sum(batch[0])
    assert torch.equal(after.projected, case.projected)
    assert not after.states.reads[:tokens].any() and not after.rounded[:tokens].any()
    assert not after.states.state_cache.any()
    writing = replace(case.states, write_enabled=torch.ones(2, dtype=torch.int32))
    wrote = run(replace(case, states=writing), place)
    assert wrote.states.state_cache.any(), "control: such rows have something to write"


ORACLE = {"decode": ([1, 1, 0, 1], [3, 8, 5, 0]), "mixed": ([6, 1, 0, 9], [3, 8, 5, 0]), "empty": ([0], [2])}


@pairs(
    {
        "batch": list(ORACLE),
        "dtype": [torch.float32, torch.bfloat16],
        "corrects,norms,rotated": [("q", True, 16), ("qkv", False, 8), ("", True, 0), ("v", False, 0)],
    }
)
@everywhere
def test_against_the_oracle(place, batch, dtype, corrects, norms, rotated):
    queries, computed = ORACLE[batch]
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
    check(case, place)


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
        call(case, **change(case))


# --- in the interpreter -----------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(st.sampled_from([0, 1, 1, 3]), st.integers(0, 12)), min_size=1, max_size=4),
    decode=st.booleans(),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    rankwise=st.booleans(),
    seed=st.integers(0, 1000),
)
@interpreted
def test_any_batch_by_the_kernels(place, batch, decode, mode, rankwise, seed):
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
    check(case, place, pick.choice(["forward", "reverse", "shuffle"]))


@interpreted
def test_without_the_counter_a_head_would_read_the_new_state(place):
    """Control: the programs of a row may come in any order because the last one writes. Were each to write, the checker
    would see one overwrite what another still reads."""
    case = make_inputs(DeltaRuleSpec(8, 1), [1, 1], [3, 5], corrects="q")
    programs = case.inputs.touched()[1]
    counter = torch.full((2,), programs - 1, dtype=torch.int32)  # the first to come takes itself for the last
    with pytest.raises(AssertionError, match="race"):
        run(case, place, counter=counter)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

BATCHES = {  # new tokens, tokens before
    "decode": ([1] * 300, [n % 40 for n in range(300)]),
    "mixed": ([3, 0, 17, 1], [0, 4, 9, 30]),
    "long": ([700, 1, 0, 300], [5, 40, 3, 0]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads,corrects,norms,rotated",
    [
        ((32, 8, 128), "q", True, 128),
        ((32, 8, 128), "qkv", False, 128),
        ((40, 8, 80), "qv", False, 80),
        ((14, 2, 64), "k", True, 32),
        ((4, 4, 96), "v", False, 0),
    ],
)
@on_gpu
def test_the_shapes_of_models(place, batch, dtype, heads, corrects, norms, rotated):
    case = make_inputs(
        DeltaRuleSpec(8, 1),
        *BATCHES[batch],
        heads=heads,
        corrects=corrects,
        norms=norms,
        rotated=rotated,
        dtype=dtype,
        interleaved=rotated == 32,
        padding_tokens=2,
    )
    check(case, place)


@pytest.mark.parametrize("rank,heads", [(4, 1), (8, 4), (16, 2), (32, 1), (16, 4), (32, 4)])
@on_gpu
def test_every_state_in_a_large_batch(place, rank, heads):
    case = make_inputs(DeltaRuleSpec(rank, heads), *BATCHES["decode"], heads=(8, 2, 128), rotated=128, corrects="qv")
    check(case, place)


@on_gpu
def test_replays_equal_eager_bit_by_bit(place):
    """Three decode steps of one graph: the counters are as they were, whichever program comes last."""
    case = make_inputs(DeltaRuleSpec(8, 1), *BATCHES["decode"], heads=(32, 8, 128), rotated=128, dtype=torch.bfloat16)
    eager, captured, warm = (case.clone().to("cuda") for _ in range(3))
    call(warm)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(captured)
    for _ in range(3):
        call(eager)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.projected, eager.projected) and torch.equal(captured.states.reads, eager.states.reads)
    assert torch.equal(captured.states.state_cache, eager.states.state_cache)
