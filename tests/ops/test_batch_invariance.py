"""The batch-invariant way on a CPU, through the ops: a row's bits are those that it has alone."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mem_triton.ops.delta_rule import DeltaRuleSpec, delta_rule_paged
from mem_triton.ops.memory_attention import FOREVER, Policy, memory_attention
from mem_triton.ops.memory_attention.cpu import paged_numba
from tests.ops.attention_case import AttentionCase, assert_matches, in_order, make_case, random_case
from tests.ops.paged_case import make_case as make_states

INVARIANT = Policy(batch_invariant=True)


def run(case: AttentionCase, policy: Policy | None = INVARIANT) -> AttentionCase:
    after = case.fresh()
    memory_attention(after.call(), policy=policy)
    return after


def moved(case: AttentionCase, policy: Policy | None) -> list[int]:
    """Rows whose bits in the batch are not those that they have alone."""
    after, rows = run(case, policy), []
    for row, (begin, end) in enumerate(pairwise(case.context.query_start_loc.tolist())):
        part = run(in_order(case, [row], 0)[0], policy)
        if not (torch.equal(after.out[begin:end], part.out) and torch.equal(after.lse[begin:end], part.lse)):
            rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_any_row_alone_and_in_any_batch(seed):
    case = random_case(random.Random(seed))
    assert_matches(run(case))
    assert moved(case, INVARIANT) == []


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
