"""``delta_rule_paged`` on the CPU against the fp64 oracle: values, what stays untouched, and its checks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.delta_rule import DeltaRuleSpec, activate, delta_rule, delta_rule_paged
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton.systems.payload import StateRef
from tests.ops.paged_case import PagedCase, assert_matches, expected, make_case, relative_rms


def run(case: PagedCase) -> PagedCase:
    after = case.clone()
    delta_rule_paged(*after.arguments(), **after.options())
    return after


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 5, 17, 40]), st.integers(0, 20)), min_size=1, max_size=5),
    layout=st.sampled_from([(1, 1), (4, 1), (8, 2), (8, 4), (16, 16), (24, 24), (32, 32), (21, 7), (37, 37)]),
    spec=st.builds(
        DeltaRuleSpec,
        st.sampled_from([4, 8, 16]),
        st.integers(1, 3),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_batch(batch, layout, spec, dtype, seed):
    pick = random.Random(seed)
    queries, computed = zip(*batch, strict=True)
    case = make_case(
        spec,
        list(queries),
        list(computed),
        block_size=layout[0],
        tokens_per_state=layout[1],
        slots=pick.choice([None, pick.sample([-1, 0, 1, 2, 3], len(batch))]),
        writes=pick.choice([None, [pick.randint(0, 1) for _ in batch]]),
        null_rows=pick.choice([(), (0,)]),
        padding_tokens=pick.choice([0, 3]),
        dtype=dtype,
        seed=seed,
    )
    assert_matches(run(case), case, expected(case), tolerance=5e-6)


def test_a2_the_first_token_of_a_fresh_row_reads_zero_and_the_second_does_not():
    reads = run(make_case(DeltaRuleSpec(8, 2), [2], [0])).reads
    assert (reads[0] == 0).all() and (reads[1] != 0).any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 39), max_size=6), span=st.sampled_from([1, 4, 8, 16]))
def test_a3_any_split_of_a_sequence_gives_the_same_reads_and_state(cuts, span):
    total = 40
    whole = make_case(DeltaRuleSpec(8, 2), [total], [0], block_size=16, tokens_per_state=span, slots=[1])
    after, parts = run(whole), whole.clone()
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), total], strict=True):
        step = replace(
            parts,
            projections=whole.projections[begin:end],
            reads=parts.reads[begin:end],
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
        )
        delta_rule_paged(*step.arguments(), **step.options())
    assert torch.equal(parts.reads[:total], after.reads[:total])  # bit by bit: nothing depends on the cut
    assert torch.equal(parts.state_cache, after.state_cache)
    assert torch.equal(parts.last_states[1, 1], after.last_states[1, 1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)), padding=st.integers(0, 3))
def test_a7_rows_are_isolated_from_their_neighbours(order, padding):
    queries, computed = [1, 20, 1, 0], [9, 3, 0, 4]
    case = make_case(DeltaRuleSpec(8, 1), queries, computed, slots=[3, 1, -1, 0], writes=[1, 1, 0, 1])
    after, pieces, starts = run(case), case.projections.split(queries), case.query_start_loc.tolist()
    rows, lengths = list(order), [queries[n] for n in order]
    tail = case.projections.new_full((padding, case.spec.projection_width), float("nan"))
    other = replace(
        case,
        projections=torch.cat([*(pieces[n] for n in rows), tail]),
        reads=torch.full((30, 8), float("nan")),
        block_table=case.block_table[rows],
        query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_lens=case.seq_lens[rows],
        initial_slot=case.initial_slot[rows],
        write_enabled=case.write_enabled[rows],
    )
    again = run(other)
    at = 0
    for n in rows:
        assert torch.equal(again.reads[at : at + queries[n]], after.reads[starts[n] : starts[n] + queries[n]])
        at += queries[n]
    assert torch.equal(again.state_cache, after.state_cache) and torch.equal(again.last_states, after.last_states)


@pytest.mark.parametrize("tokens", [1, 30])
def test_a10_a_frozen_row_leaves_its_state_bit_identical(tokens):
    case = make_case(DeltaRuleSpec(8, 2), [tokens], [5], slots=[1], writes=[0])
    after = run(case)
    start = case.state_cache[case.block_table[0, 0], 1].view(torch.int32)
    length = 5 + tokens
    end = after.state_cache[case.block_table[0, (length - 1) // 8], (length - 1) % 8 // 4]
    assert torch.equal(end.view(torch.int32), start)
    assert torch.equal(after.last_states[1, (length - 1) % 2].view(torch.int32), start)


@pytest.mark.parametrize("steps", [[30], [1] * 12, [9, 1, 8]])
def test_fault16_a_row_that_says_nothing_reads_zeros_beside_one_that_writes(steps):
    """The tables of a worker whose scope is sessions, step after step; a state is read by its own row alone."""
    spec, slots = DeltaRuleSpec(8, 2), StateSlots([0], 128, 2, torch.device("cpu"), writes=False)
    slots.enter("alice", StateRef("l"))
    at, cache = 0, None
    for step in steps:
        case = make_case(spec, [step, step], [at, at], slots=[0, 0], seed=at)
        slots.set_rows(["plain", "alice"], [at + step - 1] * 2)
        cache = torch.zeros(20, *case.state_cache.shape[1:]) if cache is None else cache
        table = torch.arange(1, 2 * case.block_table.shape[1] + 1, dtype=torch.int32).view(-1, 2).T.contiguous()
        case = replace(
            case,
            block_table=table,
            state_cache=cache,
            initial_states=slots.initial[0],
            last_states=slots.last[0],
            initial_slot=slots.row_slot,
            write_enabled=slots.row_write,
        )
        delta_rule_paged(*case.arguments(), **case.options())
        assert not case.reads[:step].any() and case.reads[step + 1 : 2 * step].any() == (step > 1)
        assert at == 0 or case.reads[step : 2 * step].any()
        at += step
    assert not cache[table[0].long()].any() and cache[table[1].long()].any()


def test_a_row_that_follows_another_on_its_blocks_sees_them_written():
    """Two equal prompts in one step, the second a prefix hit on blocks that the first computes in the same call."""
    spec = DeltaRuleSpec(8, 1)
    case = make_case(spec, [17, 9], [0, 8])
    case.block_table[1, 0] = case.block_table[0, 0]
    case.projections[17:] = case.projections[8:17]
    after = run(case)
    torch.testing.assert_close(after.reads[17:26], after.reads[8:17], rtol=1e-6, atol=1e-7)


def test_8192_tokens_stay_within_1e_5_of_fp64():
    spec, tokens = DeltaRuleSpec(8, 1), 8192
    case = make_case(spec, [tokens], [0], block_size=16, tokens_per_state=16)
    case.gate_bias.fill_(-3.0)
    after = run(case)
    reads, _, states = delta_rule(activate(case.projections.double(), case.gate_bias.double(), spec), snapshot_every=16)
    assert relative_rms(after.reads[:tokens], reads.flatten(1)) <= 1e-5
    assert relative_rms(after.state_cache[case.block_table[0].long(), 0], states[0].flatten(1)) <= 1e-5


def test_opcheck():
    """The declared mutation, the fake implementation and the traced op agree with what runs."""
    for slots in (None, [1, -1]):
        case = make_case(DeltaRuleSpec(8, 1), [3, 1], [0, 9], slots=slots, writes=slots and [1, 0])
        case.reads.zero_()  # opcheck compares runs, and NaN equals nothing
        options = {**vars(case.spec), **case.options()}
        torch.library.opcheck(torch.ops.mem_triton.delta_rule_paged, tuple(case.tensors().values()), options)


def test_a_compiled_caller_gets_the_same_as_an_eager_one():
    case = make_case(DeltaRuleSpec(8, 1), [3, 1], [0, 9])
    eager, traced = run(case), case.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*arguments):
        delta_rule_paged(*arguments, **case.options())

    step(*traced.arguments())
    assert torch.equal(traced.state_cache, eager.state_cache) and torch.equal(traced.reads[:4], eager.reads[:4])


@pytest.mark.parametrize(
    "name,spoil",
    [
        ("projections", lambda t: t[:, :-1]),
        ("projections", lambda t: t.double()),
        ("projections", lambda t: t.T.contiguous().T),
        ("gate_bias", lambda t: t[:-1]),
        ("reads", lambda t: t[:2]),
        ("reads", lambda t: t.bfloat16()),
        ("state_cache", lambda t: t[:, :1]),
        ("state_cache", lambda t: t.bfloat16()),
        ("block_table", lambda t: t.long()),
        ("query_start_loc", lambda t: t[:-1]),
        ("seq_lens", lambda t: t.long()),
        ("initial_states", lambda t: t[:, :-1]),
        ("initial_slot", lambda t: t[:1]),
        ("initial_slot", lambda t: None),
        ("write_enabled", lambda t: t.bool()),
        ("last_states", lambda t: t[:, :1]),
        ("last_states", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, spoil):
    case = make_case(DeltaRuleSpec(8, 1), [3, 1], [0, 9], slots=[0, 1], writes=[1, 1])
    spoilt = replace(case, **{name: spoil(getattr(case, name))})
    with pytest.raises(ValueError, match=f"^{name}: "):
        delta_rule_paged(*spoilt.arguments(), **case.options())


def test_block_size_must_hold_whole_spans():
    case = make_case(DeltaRuleSpec(8, 1), [3], [0])
    with pytest.raises(ValueError, match="block_size=8 must be a multiple of tokens_per_state=3"):
        delta_rule_paged(*case.arguments(), **{**case.options(), "tokens_per_state": 3})
