"""The batch-invariant way on a GPU, interpreted: a row has the same bits alone, in any batch, and cut into steps."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.delta_rule import DeltaRuleSpec, launch
from mem_triton.ops.memory_attention import FOREVER, invariant
from mem_triton.ops.memory_attention.fused import launch as attention_launch
from mem_triton.ops.tuning.delta_rule import select
from mem_triton.ops.tuning.memory_attention_fused import select as select_attention
from tests.ops.attention_case import AttentionCase, assert_matches, in_order, make_case, random_case
from tests.ops.paged_case import make_case as make_states
from tests.support.interp import sanitize


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(attention_launch, "architecture", lambda device: "sm90")


@pytest.fixture(autouse=True)
def each_row_of_a_product_by_itself(monkeypatch):
    """As on a GPU: the interpreter multiplies by NumPy, whose BLAS sums a row otherwise beside others on some CPUs."""

    def matmul(a, b, dtype=None):
        return np.einsum("...ij,...jk->...ik", a, b, dtype=dtype, casting="unsafe")

    monkeypatch.setattr(np, "matmul", matmul)


def run(case: AttentionCase, order: str = "forward") -> AttentionCase:
    after = case.fresh()
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


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000))
def test_any_row_alone_and_in_any_batch(seed):
    case = random_case(pick := random.Random(seed))
    after = run(case, pick.choice(["forward", "reverse", "shuffle"]))
    assert_matches(after)
    for row in range(len(rows_of(case))):
        assert same_bits(after, run(alone(case, row)), row), f"row {row}"


MIXED = dict(rows=[(1, 1100), (40, 90), (1, 3)], heads=(4, 1), memories=[[(8, 0, FOREVER)] * 3] * 3, shared=40)


def test_decode_beside_a_prefill_and_the_control():
    """The usual way cuts a row's keys into as many parts as the batch leaves programs for."""
    case = make_case(**MIXED)
    after = run(case)
    assert all(same_bits(after, run(alone(case, row)), row) for row in range(3))
    assert not same_bits(usual(case), usual(alone(case, 0)), 0)


def test_a_wider_block_table_changes_nothing():
    """The longest context that an engine allows is none of a row's business."""
    case = make_case([(1, 700)], heads=(4, 1))
    table = torch.nn.functional.pad(case.context.block_table, (0, 200))
    wide = replace(case, context=case.context._replace(block_table=table))
    assert torch.equal(run(case).out, run(wide).out)


@pytest.mark.parametrize("cut", [2, 17, 64, 98])
def test_a_prompt_in_two_steps(cut):
    """100 queries behind 30 tokens, at once and cut; memory is seen by all."""
    whole = make_case([(100, 30)], memories=[[(8, 0, FOREVER), (5, 0, FOREVER)]], shared=20)
    after = run(whole)
    for begin, count in ((0, cut), (cut, 100 - cut)):
        context = whole.context._replace(
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([30 + begin + count], dtype=torch.int32),
            max_query_len=count,
        )
        tokens = slice(begin, begin + count)
        step = replace(whole, query=whole.query[tokens], out=whole.out[tokens], lse=whole.lse[tokens], context=context)
        assert torch.equal(run(step).out, after.out[tokens])


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit; cells that nobody wrote are NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def delta(case, batch_invariant: bool):
    after = case.clone()
    config = replace(select("sm90", 8), max_recurrent=16, chunk=16)  # so that few tokens make a long prompt
    longest = 1 if batch_invariant else case.max_query_len  # as the op has it
    launch.step_rows(*after.arguments(), case.block_size, case.tokens_per_state, longest, config)
    return after


def test_a_short_row_beside_a_long_one_in_delta_mem():
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


def test_a_long_row_cut_in_delta_mem_and_the_control():
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


def test_more_rows_than_one_launch_takes_have_the_same_bits(monkeypatch):
    """And the workspace holds the parts of one launch: it does not grow with the batch."""
    case = make_case([(1, n) for n in (5, 40, 0, 17, 3)], memories=[[(3, 0, FOREVER)], None] * 2 + [None], heads=(2, 1))
    whole = run(case)
    taken = []
    stock = attention_launch.workspace_for
    monkeypatch.setattr(attention_launch, "workspace_for", lambda *args: taken.append(args[1].programs) or stock(*args))
    monkeypatch.setattr(invariant, "ROWS", 2)
    apart = run(case)
    assert torch.equal(apart.out, whole.out) and torch.equal(apart.lse, whole.lse)
    assert_matches(apart)
    assert taken == [2 * invariant.SPLITS, 2 * invariant.SPLITS, invariant.SPLITS]
