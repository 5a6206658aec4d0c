"""The batch-invariant way, wherever it runs: a row has the same bits alone, in any batch, and cut into steps."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mem_triton.ops.delta_rule import DeltaRuleSpec, delta_rule_paged, launch
from mem_triton.ops.memory_attention import FOREVER, Policy, invariant, memory_attention
from mem_triton.ops.memory_attention.cpu import paged_numba
from mem_triton.ops.memory_attention.fused import launch as attention_launch
from mem_triton.ops.tuning.delta_rule import select
from mem_triton.ops.tuning.memory_attention_fused import select as select_attention
from tests.ops.attention_case import AttentionCase, assert_matches, in_order, make_case, random_case, to_device
from tests.ops.paged_case import make_case as make_states
from tests.support.interp import sanitize
from tests.support.places import INTERPRETED, by_kernels, cases, everywhere, interpreted

INVARIANT = Policy(batch_invariant=True)


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch):
    """In the interpreter, launch as on Hopper, and multiply each row by itself as on a GPU: NumPy's BLAS sums a row
    otherwise beside others on some CPUs."""

    def matmul(a, b, dtype=None):
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype, casting="unsafe")

    if INTERPRETED:
        monkeypatch.setattr(attention_launch, "architecture", lambda device: "sm90")
        monkeypatch.setattr(np, "matmul", matmul)


def run(
    case: AttentionCase, place: str = "cpu", order: str = "forward", policy: Policy | None = INVARIANT
) -> AttentionCase:
    """The runner: the case after the op ran. In the interpreter no finding may be made."""
    after = case.fresh()
    if place != "interpreter":
        moved = to_device(after) if place == "gpu" else after
        memory_attention(moved.call(), policy=policy)
        return to_device(moved, "cpu")
    with sanitize(order) as findings:
        invariant.launch_parts(after.call())
    assert not findings, "\n".join(findings)
    return after


def usual(case: AttentionCase) -> AttentionCase:
    """What runs otherwise, on a GPU so small that four blocks of queries fill it."""
    after = case.fresh()
    small = replace(select_attention("sm90", 32, 4, 1), programs=4)
    attention_launch.attend(after.call(), config=small)
    return after


def alone(case: AttentionCase, row: int) -> AttentionCase:
    """The row in a batch of its own, which knows how long its longest row is."""
    part = in_order(case, [row], 0)[0]
    count = max(1, len(part.query))
    return replace(part, context=part.context._replace(max_query_len=count))


def rows_of(case: AttentionCase) -> list[slice]:
    starts = case.context.query_start_loc.tolist()
    return [slice(a, b) for a, b in pairwise(starts)]


def same_bits(after: AttentionCase, part: AttentionCase, row: int) -> bool:
    tokens = rows_of(after)[row]
    return torch.equal(after.out[tokens], part.out) and torch.equal(after.lse[tokens], part.lse)


def moved(case: AttentionCase, policy: Policy | None) -> list[int]:
    """Rows whose bits on a CPU are not those that they have alone, however long the batch says that its rows may be."""
    after = run(case, policy=policy)
    return [
        row
        for row in range(len(rows_of(case)))
        if not same_bits(after, run(in_order(case, [row], 0)[0], policy=policy), row)
    ]


ORDERS = ["forward", "reverse", "shuffle"]
SEEDS = {"cpu": 40, "interpreter": 6, "gpu": 40}


@pytest.mark.parametrize("place,seed", cases(*((place, n) for place, count in SEEDS.items() for n in range(count))))
def test_any_row_alone_and_in_any_batch(place, seed):
    case = random_case(pick := random.Random(seed))
    after = run(case, place, pick.choice(ORDERS))
    assert_matches(after)
    for row in range(len(rows_of(case))):
        assert same_bits(after, run(alone(case, row), place), row), f"row {row}"
    if place == "cpu":
        assert moved(case, INVARIANT) == []


MIXED = dict(rows=[(1, 1100), (40, 90), (1, 3)], heads=(4, 1), memories=[[(8, 0, FOREVER)] * 3] * 3, shared=40)


@interpreted
def test_decode_beside_a_prefill_and_the_control(place):
    """The usual way cuts a row's keys into as many parts as the batch leaves programs for."""
    case = make_case(**MIXED)
    after = run(case, place)
    assert all(same_bits(after, run(alone(case, row), place), row) for row in range(3))
    assert not same_bits(usual(case), usual(alone(case, 0)), 0)


@everywhere
def test_a_wider_block_table_changes_nothing(place):
    """The longest context that an engine allows is none of a row's business."""
    case = make_case([(1, 700)], heads=(4, 1))
    table = torch.nn.functional.pad(case.context.block_table, (0, 200))
    wide = replace(case, context=case.context._replace(block_table=table))
    assert torch.equal(run(case, place).out, run(wide, place).out)


@pytest.mark.parametrize("cut", [2, 17, 64, 98])
@by_kernels
def test_a_prompt_in_two_steps(place, cut):
    """100 queries behind 30 tokens, at once and cut; memory is seen by all."""
    whole = make_case([(100, 30)], memories=[[(8, 0, FOREVER), (5, 0, FOREVER)]], shared=20)
    after = run(whole, place)
    for begin, count in ((0, cut), (cut, 100 - cut)):
        context = whole.context._replace(
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([30 + begin + count], dtype=torch.int32),
            max_query_len=count,
        )
        tokens = slice(begin, begin + count)
        step = replace(whole, query=whole.query[tokens], out=whole.out[tokens], lse=whole.lse[tokens], context=context)
        assert torch.equal(run(step, place).out, after.out[tokens])


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit; cells that nobody wrote are NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def delta(case, batch_invariant: bool):
    after = case.clone()
    config = replace(select("sm90", 8), max_recurrent=16, chunk=16)  # so that few tokens make a long prompt
    longest = 1 if batch_invariant else case.max_query_len  # as the op has it
    launch.step_rows(*after.arguments(), case.block_size, case.tokens_per_state, longest, config)
    return after


@interpreted
def test_a_short_row_beside_a_long_one_in_delta_mem(place):
    case = make_states(DeltaRuleSpec(8, 2), [60, 3], [4, 9], slots=[0, 1], writes=[1, 1])
    tokens = slice(60, 63)
    short = replace(
        case,
        block_table=case.block_table[1:],
        query_start_loc=torch.tensor([0, 3], dtype=torch.int32),
        projections=case.projections[tokens],
        reads=case.reads[tokens],
        seq_lens=case.seq_lens[1:],
        initial_slot=case.initial_slot[1:],
        write_enabled=case.write_enabled[1:],
        max_query_len=3,
    )
    assert same_numbers(delta(case, True).reads[tokens], delta(short, True).reads)


@interpreted
def test_a_long_row_cut_in_delta_mem_and_the_control(place):
    whole = make_states(DeltaRuleSpec(8, 1), [70], [0], seed=3)
    for invariantly in (True, False):
        after, steps = delta(whole, invariantly), whole.clone()
        for begin, count in ((0, 33), (33, 37)):
            tokens = slice(begin, begin + count)
            step = replace(
                steps,
                projections=whole.projections[tokens],
                reads=whole.reads[tokens],
                max_query_len=count,
                query_start_loc=torch.tensor([0, count], dtype=torch.int32),
                seq_lens=torch.tensor([begin + count], dtype=torch.int32),
            )
            done = delta(step, invariantly)
            steps = replace(steps, state_cache=done.state_cache)
        equal = same_numbers(after.reads[33:70], done.reads[:37]) and same_numbers(after.state_cache, steps.state_cache)
        assert equal == invariantly


@interpreted
def test_more_rows_than_one_launch_takes_have_the_same_bits(place, monkeypatch):
    """And the workspace holds the parts of one launch: it does not grow with the batch."""
    case = make_case([(1, n) for n in (5, 40, 0, 17, 3)], memories=[[(3, 0, FOREVER)], None] * 2 + [None], heads=(2, 1))
    whole = run(case, place)
    taken = []
    stock = attention_launch.workspace_for
    monkeypatch.setattr(attention_launch, "workspace_for", lambda *args: taken.append(args[1].programs) or stock(*args))
    monkeypatch.setattr(invariant, "ROWS", 2)
    apart = run(case, place)
    assert torch.equal(apart.out, whole.out) and torch.equal(apart.lse, whole.lse)
    assert_matches(apart)
    assert taken == [2 * invariant.SPLITS, 2 * invariant.SPLITS, invariant.SPLITS]


def test_rows_of_alike_lengths_and_the_control(monkeypatch):
    """The usual way attends to them together, padded to the longest."""
    rows = [(1, length) for length in (500, 511, 523, 530)] + [(7, 60), (7, 66)]
    case = make_case(rows, heads=(8, 2), size=64, memories=[[(8, 0, FOREVER)] * 3] * 6, shared=300)
    assert moved(case, INVARIANT) == []
    assert moved(case, None) == [], "numba attends rows one by one"
    monkeypatch.setattr(paged_numba, "takes", lambda call: False)
    assert moved(case, INVARIANT) == []
    assert moved(case, None) != []


def test_delta_mem_alone_in_a_batch_and_cut():
    case = make_states(DeltaRuleSpec(8, 2), [60, 1, 3], [4, 9, 0], slots=[0, 1, 2], writes=[1, 1, 1])
    case.reads[:] = 0
    whole = case.clone()
    delta_rule_paged(*whole.arguments(), **whole.options(), batch_invariant=True)
    for begin, count in ((0, 37), (37, 23)):
        step = replace(
            case,
            projections=case.projections[begin:][:count],
            reads=case.reads[begin:][:count],
            block_table=case.block_table[:1],
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([4 + begin + count], dtype=torch.int32),
            initial_slot=case.initial_slot[:1],
            write_enabled=case.write_enabled[:1],
            max_query_len=count,
        )
        delta_rule_paged(*step.arguments(), **step.options(), batch_invariant=True)
    assert torch.equal(case.reads[:60], whole.reads[:60])


def test_routes_that_cannot_be_invariant_are_refused():
    with pytest.raises(ValueError, match='only "fused" can be batch-invariant'):
        Policy("shared_batched", batch_invariant=True)
