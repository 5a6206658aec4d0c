"""The delta rule's kernels against the fp64 oracle, with memory watched and unwritten outputs poisoned."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.delta_rule import DeltaRuleSpec, activate, delta_rule, launch
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig, select
from tests.ops.paged_case import PagedCase, assert_matches, expected, make_case, relative_rms
from tests.support.interp import sanitize

TOKEN_BY_TOKEN = DeltaRuleConfig(max_recurrent=1 << 30, rows=8, warps=1, chunk=4, chunk_rows=4, chunk_warps=1)
IN_CHUNKS = replace(TOKEN_BY_TOKEN, max_recurrent=0)  # chunks of 4 tokens, so that short rows have many


def run(case: PagedCase, config: DeltaRuleConfig, order: str = "forward") -> PagedCase:
    """The case after the kernels ran on a copy of it; fails on any finding of the memory checker."""
    after = case.clone()
    with sanitize(order) as findings:
        launch.step_rows(*after.arguments(), case.block_size, case.tokens_per_state, case.max_query_len, config)
    assert not findings, "\n".join(findings)
    return after


def check(case: PagedCase, config: DeltaRuleConfig, order: str = "forward", tolerance: float = 2e-6) -> None:
    assert_matches(run(case, config, order), case, expected(case), tolerance)


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("couple", [True, False], ids=["coupled", "uncoupled"])
@pytest.mark.parametrize("rankwise", [True, False], ids=["rankwise", "headwise"])
def test_every_gate_semantics(config, mode, couple, rankwise):
    spec = DeltaRuleSpec(8, 2, rankwise, couple, mode, normalize_qk=rankwise)
    scale = 1.0 if spec.normalize_qk else 0.3  # raw keys longer than 1 let the state grow without bound
    case = make_case(spec, [6, 1, 0, 9], [3, 8, 5, 0], slots=[-1, 2, 3, 1], writes=[1, 1, 1, 1], scale=scale)
    check(case, config, "reverse")


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
@pytest.mark.parametrize("rank,heads", [(4, 1), (4, 8), (8, 1), (8, 3), (8, 4), (16, 2), (32, 1)])
def test_every_shape(config, rank, heads):
    case = make_case(DeltaRuleSpec(rank, heads), [7, 1], [0, 5], slots=[0, -1], seed=rank + heads)
    check(case, config, "shuffle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_projection_dtypes_and_small_inputs(dtype, config):
    """Small q and k are where a tanh computed as (1 - e) / (1 + e) loses its digits before the norm blows them up."""
    for scale in (1.0, 1e-3):
        check(make_case(DeltaRuleSpec(8, 1), [9, 2], [1, 0], dtype=dtype, scale=scale), config)


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_saturated_gates(config):
    case = make_case(DeltaRuleSpec(8, 1, couple_lambda=False), [9], [4])
    case.projections[:, 24:] *= 300.0  # gates of exactly 0 and 1
    check(case, config)


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_a10_frozen_row_carries_its_state_bit_by_bit(config):
    case = make_case(DeltaRuleSpec(8, 2), [11, 1, 11, 3], [5, 7, 0, 0], slots=[0, 1, 2, -1], writes=[0, 0, 0, 1])
    case.state_cache[case.state_cache.abs() < 0.1] = -0.0  # a sign that arithmetic would lose
    case.initial_states[2, ::3] = -0.0
    after = run(case, config)
    assert_matches(after, case, expected(case))
    bits = lambda t: t.view(torch.int32)  # noqa: E731
    starts = [case.state_cache[case.block_table[r, (c - 1) // 8], (c - 1) % 8 // 4] for r, c in ((0, 5), (1, 7))]
    starts.append(case.initial_states[2])
    for row, (start, length) in enumerate(zip(starts, (16, 8, 11), strict=True)):
        block, cell = case.block_table[row, (length - 1) // 8], (length - 1) % 8 // 4
        assert torch.equal(bits(after.state_cache[block, cell]), bits(start))
        assert torch.equal(bits(after.last_states[row, (length - 1) % 2]), bits(start))


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_null_block_is_neither_read_nor_written(config):
    case = make_case(DeltaRuleSpec(8, 1), [9, 5], [6, 0], null_rows=(0, 1))
    case.state_cache[0] = float("nan")
    after = run(case, config)
    assert after.state_cache[0].isnan().all() and not after.reads[:14].isnan().any()
    assert torch.equal(after.state_cache[1:], case.state_cache[1:])


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_strided_tensors(config):
    """A cache whose blocks lie apart, projections and reads that are columns of something wider."""
    case = make_case(DeltaRuleSpec(8, 1), [6, 1], [3, 4])
    want = expected(case)
    wide = torch.full((len(case.state_cache), 3, 2, 64), float("nan"))
    wide[:, 1] = case.state_cache
    projections = torch.full((len(case.projections), 50), float("nan"))
    projections[:, :32] = case.projections
    reads = torch.full((len(case.reads), 11), float("nan"))
    strided = replace(case, state_cache=wide[:, 1], projections=projections[:, :32], reads=reads[:, 2:10])
    with sanitize() as findings:
        launch.step_rows(*strided.arguments(), 8, 4, case.max_query_len, config)
    assert not findings, findings
    assert_matches(strided, case, want)
    assert wide[:, [0, 2]].isnan().all() and reads[:, [0, 1, 10]].isnan().all()


batches = st.lists(st.tuples(st.integers(0, 13), st.integers(0, 12)), min_size=1, max_size=5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=batches,
    layout=st.sampled_from([(1, 1), (4, 1), (8, 4), (6, 3), (16, 16)]),
    spec=st.builds(DeltaRuleSpec, st.sampled_from([4, 8]), st.integers(1, 3), st.booleans(), st.booleans()),
    config=st.sampled_from([TOKEN_BY_TOKEN, IN_CHUNKS, replace(IN_CHUNKS, chunk=2, chunk_rows=2)]),
    options=st.tuples(st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 1000)),
)
def test_any_batch(batch, layout, spec, config, options):
    with_slots, with_writes, padding, seed = options
    pick = random.Random(seed)
    queries, computed = zip(*batch, strict=True)
    slots = pick.sample([-1, 0, 1, 2, 3], len(batch)) if with_slots else None
    writes = [pick.randint(0, 1) for _ in batch] if with_writes else None
    case = make_case(
        spec,
        list(queries),
        list(computed),
        block_size=layout[0],
        tokens_per_state=layout[1],
        slots=slots,
        writes=writes,
        padding_tokens=padding,
        seed=seed,
    )
    check(case, config, pick.choice(["forward", "reverse", "shuffle"]))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(split=st.integers(1, 18), first=st.sampled_from([TOKEN_BY_TOKEN, IN_CHUNKS]), span=st.sampled_from([1, 4, 8]))
def test_a3_any_split_of_a_sequence_gives_the_same_reads_and_state(split, first, span):
    spec, total = DeltaRuleSpec(8, 1), 19
    whole = make_case(spec, [total], [0], tokens_per_state=span, slots=[1])
    after = run(whole, IN_CHUNKS)
    parts = whole.clone()
    for begin, end, config in ((0, split, first), (split, total, IN_CHUNKS)):
        part = replace(
            parts,
            projections=whole.projections[begin:end],
            reads=parts.reads[begin:end],
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
        )
        launch.step_rows(*part.arguments(), 8, span, end - begin, config)
    assert relative_rms(parts.reads[:total], after.reads[:total].double()) <= 1e-6
    assert relative_rms(parts.state_cache, after.state_cache.double()) <= 1e-6
    end = (1, (total - 1) % 2)
    assert relative_rms(parts.last_states[end], after.last_states[end].double()) <= 1e-6


@pytest.mark.parametrize("config", [TOKEN_BY_TOKEN, IN_CHUNKS], ids=["token_by_token", "in_chunks"])
def test_a7_a_row_is_bit_equal_whatever_stands_beside_it(config):
    """Alone, in another order, or between padding rows: the same bits."""
    case = make_case(DeltaRuleSpec(8, 1), [5, 1, 9], [2, 9, 0], slots=[2, -1, 0], writes=[1, 1, 0])
    after = run(case, config)
    pieces = case.projections.split([5, 1, 9])
    for order in ([2, 0, 1], [1], [0, None, 2, None]):
        rows = [-1 if n is None else n for n in order]
        lengths = [0 if n is None else len(pieces[n]) for n in order]
        other = replace(
            case.clone(),
            projections=torch.cat([pieces[n] for n in order if n is not None]),
            reads=torch.full((15, 8), float("nan")),
            block_table=case.block_table[rows],
            query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
            seq_lens=case.seq_lens[rows],
            initial_slot=case.initial_slot[rows],
            write_enabled=case.write_enabled[rows],
            max_query_len=max(lengths),
        )
        other = run(other, config)
        starts = other.query_start_loc.tolist()
        for place, n in enumerate(order):
            if n is not None:
                begin = int(case.query_start_loc[n])
                assert torch.equal(
                    other.reads[starts[place] : starts[place + 1]], after.reads[begin : begin + lengths[place]]
                )
                blocks = case.block_table[n].long()
                blocks = blocks[blocks > 0]
                assert torch.equal(other.state_cache[blocks], after.state_cache[blocks])


@pytest.mark.parametrize("tokens", [256, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunked", [False, True], ids=["token_by_token", "in_chunks"])
def test_long_rows_stay_within_1e_5_of_fp64(chunked, tokens):
    spec = DeltaRuleSpec(4, 1)
    case = make_case(spec, [tokens], [0], block_size=16, tokens_per_state=16)
    case.gate_bias.fill_(-3.0)  # slow forgetting: errors add up over long stretches
    config = replace(select("sm90", 4), max_recurrent=0 if chunked else 1 << 30)
    launch.step_rows(*case.arguments(), 16, 16, tokens, config)
    inputs = activate(case.projections.double(), case.gate_bias.double(), spec)
    reads, final, _ = delta_rule(inputs)
    assert relative_rms(case.reads[:tokens], reads.flatten(1)) <= 1e-5
    assert relative_rms(case.state_cache[case.block_table[0, -1], 0], final.flatten()) <= 1e-5


def test_the_checker_sees_rows_that_share_a_block():
    """Negative control: two rows on one block race for its cells, and a block past the cache is out of bounds."""
    for config in (TOKEN_BY_TOKEN, IN_CHUNKS):
        case = make_case(DeltaRuleSpec(8, 1), [6, 6], [3, 3])
        case.block_table[1] = case.block_table[0]
        with pytest.raises(AssertionError, match=r"\[race\]"):
            run(case, config)
        case = make_case(DeltaRuleSpec(8, 1), [6, 6], [3, 3])
        case.block_table[1, 0] = len(case.state_cache)
        with pytest.raises(AssertionError, match=r"\[oob\]"):
            run(case, config)


def test_the_oracle_sees_a_wrong_state():
    """Negative control of ``assert_matches``: one state element, one foreign cell, one unwritten read."""
    case = make_case(DeltaRuleSpec(8, 1), [6, 1], [3, 8], slots=[0, 1])
    want, after = expected(case), run(case, IN_CHUNKS)
    assert_matches(after, case, want)
    for spoil in (
        lambda t: t.reads[6].fill_(float("nan")),
        lambda t: t.state_cache[0, 0, 0].add_(1),
        lambda t: t.state_cache[tuple(want.touched_cells.nonzero()[0])].mul_(1.001),
        lambda t: t.last_states[3, 0].zero_(),
    ):
        spoiled = after.clone()
        spoil(spoiled)
        with pytest.raises(AssertionError):
            assert_matches(spoiled, case, want)
