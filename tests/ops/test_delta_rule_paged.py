"""``delta_rule_paged`` against the fp64 oracle, wherever it runs: values, what stays untouched, and its checks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.delta_rule import DeltaRuleSpec, activate, delta_rule, delta_rule_paged
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig, select
from tests.ops.paged_case import PagedCase, assert_matches, expected, make_case, relative_rms
from tests.support.interp import sanitize
from tests.support.pairwise import pairs
from tests.support.places import MARKS, cases, device_of, interpreted, on_gpu

TOKEN_BY_TOKEN = DeltaRuleConfig(max_recurrent=1 << 30, rows=8, warps=1, chunk=4, chunk_rows=4, maps_warps=1)
IN_CHUNKS = replace(TOKEN_BY_TOKEN, max_recurrent=0)  # chunks of 4 tokens, so that short rows have many
TOLERANCE = {"cpu": 5e-6, "interpreter": 2e-6, "gpu": 1e-5}
WAYS = {
    "cpu": ("cpu", None),
    "token_by_token": ("interpreter", TOKEN_BY_TOKEN),
    "in_chunks": ("interpreter", IN_CHUNKS),
    "gpu": ("gpu", None),
}
every_way = pytest.mark.parametrize(
    "place,config", [pytest.param(*way, id=name, marks=MARKS[way[0]]) for name, way in WAYS.items()]
)
"""Everywhere, and in the interpreter both by token and in chunks."""


def run(
    case: PagedCase, place: str = "cpu", config: DeltaRuleConfig | None = None, order: str = "forward"
) -> PagedCase:
    """The case after the op ran on a copy of it."""
    after = case.clone().to(device_of(place))
    run_in_place(after, place, config, order)
    return after.to("cpu")


def run_in_place(case: PagedCase, place: str, config: DeltaRuleConfig | None = None, order: str = "forward") -> None:
    """The runner. In the interpreter no finding may be made."""
    if place != "interpreter":
        delta_rule_paged(*case.arguments(), **case.options())
        return
    from mem_triton.ops.delta_rule import launch

    with sanitize(order) as findings:
        launch.step_rows(*case.arguments(), case.block_size, case.tokens_per_state, case.max_query_len, config)
    assert not findings, "\n".join(findings)


def check(case: PagedCase, place: str = "cpu", config: DeltaRuleConfig | None = None, order: str = "forward") -> None:
    assert_matches(run(case, place, config, order), case, expected(case), TOLERANCE[place])


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("couple", [True, False], ids=["coupled", "uncoupled"])
@pytest.mark.parametrize("rankwise", [True, False], ids=["rankwise", "headwise"])
@every_way
def test_every_gate_semantics(place, config, mode, couple, rankwise):
    spec = DeltaRuleSpec(8, 2, rankwise, couple, mode, normalize_qk=rankwise)
    scale = 1.0 if spec.normalize_qk else 0.3  # raw keys longer than 1 let the state grow without bound
    case = make_case(spec, [6, 1, 0, 9], [3, 8, 5, 0], slots=[-1, 2, 3, 1], writes=[1, 1, 1, 1], scale=scale)
    check(case, place, config, "reverse")


@pytest.mark.parametrize("rank,heads", [(4, 1), (4, 8), (8, 1), (8, 3), (8, 4), (16, 2), (32, 1)])
@every_way
def test_every_shape(place, config, rank, heads):
    case = make_case(DeltaRuleSpec(rank, heads), [7, 1], [0, 5], slots=[0, -1], seed=rank + heads)
    check(case, place, config, "shuffle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_way
def test_projection_dtypes_and_small_inputs(dtype, place, config):
    """Small q and k are where a tanh computed as (1 - e) / (1 + e) loses its digits before the norm blows them up."""
    for scale in (1.0, 1e-3):
        check(make_case(DeltaRuleSpec(8, 1), [9, 2], [1, 0], dtype=dtype, scale=scale), place, config)


@every_way
def test_saturated_gates(place, config):
    case = make_case(DeltaRuleSpec(8, 1, couple_lambda=False), [9], [4])
    case.projections[:, 24:] *= 300.0  # gates of exactly 0 and 1
    check(case, place, config)


@every_way
def test_a10_frozen_row_carries_its_state_bit_by_bit(place, config):
    case = make_case(DeltaRuleSpec(8, 2), [11, 1, 11, 3], [5, 7, 0, 0], slots=[0, 1, 2, -1], writes=[0, 0, 0, 1])
    case.state_cache[case.state_cache.abs() < 0.1] = -0.0  # a sign that arithmetic would lose
    case.initial_states[2, ::3] = -0.0
    after = run(case, place, config)
    assert_matches(after, case, expected(case), TOLERANCE[place])
    bits = lambda t: t.view(torch.int32)  # noqa: E731
    starts = [case.state_cache[case.block_table[r, (c - 1) // 8], (c - 1) % 8 // 4] for r, c in ((0, 5), (1, 7))]
    starts.append(case.initial_states[2])
    for row, (start, length) in enumerate(zip(starts, (16, 8, 11), strict=True)):
        block, cell = case.block_table[row, (length - 1) // 8], (length - 1) % 8 // 4
        assert torch.equal(bits(after.state_cache[block, cell]), bits(start))
        assert torch.equal(bits(after.last_states[row, (length - 1) % 2]), bits(start))


@every_way
def test_null_block_is_neither_read_nor_written(place, config):
    case = make_case(DeltaRuleSpec(8, 1), [9, 5], [6, 0], null_rows=(0, 1))
    case.state_cache[0] = float("nan")
    after = run(case, place, config)
    assert after.state_cache[0].isnan().all() and not after.reads[:14].isnan().any()
    assert torch.equal(after.state_cache[1:], case.state_cache[1:])


@every_way
def test_strided_tensors(place, config):
    """A cache whose blocks lie apart, projections and reads that are columns of something wider."""
    case = make_case(DeltaRuleSpec(8, 1), [6, 1], [3, 4])
    want, device = expected(case), device_of(place)
    wide = torch.full((len(case.state_cache), 3, 2, 64), float("nan"), device=device)
    wide[:, 1] = case.state_cache
    projections = torch.full((len(case.projections), 50), float("nan"), device=device)
    projections[:, :32] = case.projections
    reads = torch.full((len(case.reads), 11), float("nan"), device=device)
    views = {"state_cache": wide[:, 1], "projections": projections[:, :32], "reads": reads[:, 2:10]}
    run_in_place(replace(case.clone().to(device), **views), place, config)
    assert_matches(replace(case.clone(), **{k: v.cpu() for k, v in views.items()}), case, want, TOLERANCE[place])
    assert wide[:, [0, 2]].isnan().all() and reads[:, [0, 1, 10]].isnan().all()


@every_way
def test_a7_a_row_is_bit_equal_whatever_stands_beside_it(place, config):
    """Alone, in another order, or between padding rows: the same bits."""
    case = make_case(DeltaRuleSpec(8, 1), [5, 1, 9], [2, 9, 0], slots=[2, -1, 0], writes=[1, 1, 0])
    after = run(case, place, config)
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
        other = run(other, place, config)
        starts = other.query_start_loc.tolist()
        for at, n in enumerate(order):
            if n is not None:
                begin = int(case.query_start_loc[n])
                assert torch.equal(other.reads[starts[at] : starts[at + 1]], after.reads[begin : begin + lengths[at]])
                blocks = case.block_table[n].long()
                blocks = blocks[blocks > 0]
                assert torch.equal(other.state_cache[blocks], after.state_cache[blocks])


@every_way
def test_the_oracle_sees_a_wrong_state(place, config):
    """Negative control of ``assert_matches``: one state element, one foreign cell, one unwritten read."""
    case = make_case(DeltaRuleSpec(8, 1), [6, 1], [3, 8], slots=[0, 1])
    want, after = expected(case), run(case, place, config)
    assert_matches(after, case, want, TOLERANCE[place])
    for spoil in (
        lambda t: t.reads[6].fill_(float("nan")),
        lambda t: t.state_cache[0, 0, 0].add_(1),
        lambda t: t.state_cache[tuple(want.touched_cells.nonzero()[0])].mul_(1.001),
        lambda t: t.last_states[3, 0].zero_(),
    ):
        spoiled = after.clone()
        spoil(spoiled)
        with pytest.raises(AssertionError):
            assert_matches(spoiled, case, want, TOLERANCE[place])


@pytest.mark.parametrize("place,dtype", cases(("cpu", torch.float32), ("gpu", torch.float32), ("gpu", torch.bfloat16)))
def test_8192_tokens_stay_within_1e_5_of_fp64(place, dtype):
    spec, tokens = DeltaRuleSpec(8, 1), 8192
    case = make_case(spec, [tokens], [0], block_size=16, tokens_per_state=16, dtype=dtype)
    case.gate_bias.fill_(-3.0)
    after = run(case, place)
    reads, _, states = delta_rule(activate(case.projections.double(), case.gate_bias.double(), spec), snapshot_every=16)
    assert relative_rms(after.reads[:tokens], reads.flatten(1)) <= 1e-5
    assert relative_rms(after.state_cache[case.block_table[0].long(), 0], states[0].flatten(1)) <= 1e-5


# --- on a CPU ---------------------------------------------------------------------------------------------------------


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
    check(case)


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
    from mem_triton.systems.delta_mem.slots import StateSlots  # needs what a machine for kernels alone lacks
    from mem_triton.systems.payload import StateRef

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


# --- in the interpreter -----------------------------------------------------------------------------------------------


batches = st.lists(st.tuples(st.integers(0, 13), st.integers(0, 12)), min_size=1, max_size=5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=batches,
    layout=st.sampled_from([(1, 1), (4, 1), (8, 4), (6, 3), (16, 16)]),
    spec=st.builds(DeltaRuleSpec, st.sampled_from([4, 8]), st.integers(1, 3), st.booleans(), st.booleans()),
    config=st.sampled_from([TOKEN_BY_TOKEN, IN_CHUNKS, replace(IN_CHUNKS, chunk=2, chunk_rows=2)]),
    options=st.tuples(st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 1000)),
)
@interpreted
def test_any_batch_by_the_kernels(place, batch, layout, spec, config, options):
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
    check(case, place, config, pick.choice(["forward", "reverse", "shuffle"]))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(split=st.integers(1, 18), first=st.sampled_from([TOKEN_BY_TOKEN, IN_CHUNKS]), span=st.sampled_from([1, 4, 8]))
@interpreted
def test_a3_any_split_of_a_sequence_gives_the_same_reads_and_state_by_the_kernels(place, split, first, span):
    from mem_triton.ops.delta_rule import launch

    spec, total = DeltaRuleSpec(8, 1), 19
    whole = make_case(spec, [total], [0], tokens_per_state=span, slots=[1])
    after = run(whole, place, IN_CHUNKS)
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


@pytest.mark.parametrize("tokens", [256, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunked", [False, True], ids=["token_by_token", "in_chunks"])
@interpreted
def test_long_rows_stay_within_1e_5_of_fp64(place, chunked, tokens):
    from mem_triton.ops.delta_rule import launch

    spec = DeltaRuleSpec(4, 1)
    case = make_case(spec, [tokens], [0], block_size=16, tokens_per_state=16)
    case.gate_bias.fill_(-3.0)  # slow forgetting: errors add up over long stretches
    config = replace(select("sm90", 4), max_recurrent=0 if chunked else 1 << 30)
    launch.step_rows(*case.arguments(), 16, 16, tokens, config)
    inputs = activate(case.projections.double(), case.gate_bias.double(), spec)
    reads, final, _ = delta_rule(inputs)
    assert relative_rms(case.reads[:tokens], reads.flatten(1)) <= 1e-5
    assert relative_rms(case.state_cache[case.block_table[0, -1], 0], final.flatten()) <= 1e-5


@interpreted
def test_the_checker_sees_rows_that_share_a_block(place):
    """Negative control: two rows on one block race for its cells, and a block past the cache is out of bounds."""
    for config in (TOKEN_BY_TOKEN, IN_CHUNKS):
        case = make_case(DeltaRuleSpec(8, 1), [6, 6], [3, 3])
        case.block_table[1] = case.block_table[0]
        with pytest.raises(AssertionError, match=r"\[race\]"):
            run(case, place, config)
        case = make_case(DeltaRuleSpec(8, 1), [6, 6], [3, 3])
        case.block_table[1, 0] = len(case.state_cache)
        with pytest.raises(AssertionError, match=r"\[oob\]"):
            run(case, place, config)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


BATCHES = {  # new tokens, tokens before
    "decode": ([1] * 9, list(range(9))),
    "short": ([3, 0, 17, 1], [0, 4, 9, 30]),
    "long": ([700, 1, 0, 300], [5, 40, 3, 0]),
}


@pairs(
    {
        "batch": list(BATCHES),
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "rank,heads": [(4, 1), (8, 1), (8, 3), (8, 4), (8, 8), (16, 2), (32, 1), (32, 4)],
    }
)
@on_gpu
def test_the_shapes_of_adapters(place, batch, dtype, rank, heads):
    queries, computed = BATCHES[batch]
    slots, writes = [-1, 0, 1, 2, 3][: len(queries)], [1, 0, 1, 1, 1][: len(queries)]
    if len(queries) > 5:
        slots, writes = None, None
    spec = DeltaRuleSpec(rank, heads)
    case = make_case(spec, queries, computed, slots=slots, writes=writes, dtype=dtype, padding_tokens=2)
    check(case, place)


@pairs(
    {
        "batch": list(BATCHES),
        "mode": ["standard", "lambda_outside", "no_lambda"],
        "couple": [True, False],
        "rankwise": [True, False],
        "normalize": [True, False],
    }
)
@on_gpu
def test_every_gate_semantics_in_long_batches(place, batch, mode, couple, rankwise, normalize):
    spec = DeltaRuleSpec(8, 2, rankwise, couple, mode, normalize)
    case = make_case(spec, *BATCHES[batch], scale=1.0 if normalize else 0.3)
    check(case, place)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_gpu
def test_graph_replay_equals_eager_bit_by_bit(place, batch, dtype):
    case = make_case(DeltaRuleSpec(8, 4), *BATCHES[batch], dtype=dtype)
    eager = run(case, place)
    captured = case.clone().to("cuda")
    warm = case.clone().to("cuda")
    delta_rule_paged(*warm.arguments(), **warm.options())  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        delta_rule_paged(*captured.arguments(), **captured.options())
    for name, tensor in captured.tensors().items():  # capture ran nothing, but be sure of the inputs
        if tensor is not None:
            tensor.copy_(getattr(case, name))
    graph.replay()
    torch.cuda.synchronize()
    after = captured.to("cpu")
    live = int(case.query_start_loc[-1])
    assert torch.equal(after.reads[:live], eager.reads[:live])
    assert torch.equal(after.state_cache, eager.state_cache)


@on_gpu
def test_one_captured_decode_graph_serves_smaller_batches(place):
    """Rows without tokens are the padding of a captured batch: nothing of theirs is read or written."""
    spec, rows = DeltaRuleSpec(8, 1), 8
    full = make_case(spec, [1] * rows, [20] * rows)
    static = full.clone().to("cuda")
    warm = full.clone().to("cuda")
    delta_rule_paged(*warm.arguments(), **warm.options())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        delta_rule_paged(*static.arguments(), **static.options())
    for live in (1, 5, 8):
        case = full.clone()
        case.query_start_loc[live:] = live
        case.block_table[live:] = 0
        for name, tensor in static.tensors().items():
            if tensor is not None:
                tensor.copy_(getattr(case, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_matches(static.to("cpu"), case, expected(case), tolerance=1e-5)
        assert static.reads[live:].isnan().all()


@on_gpu
def test_runs_are_bit_equal_and_do_not_depend_on_neighbours(place):
    case = make_case(DeltaRuleSpec(8, 2), [700, 1, 300], [5, 40, 0])
    first, second = run(case, place), run(case, place)
    assert torch.equal(first.reads[:1001], second.reads[:1001]) and torch.equal(first.state_cache, second.state_cache)
    alone = replace(
        case,
        projections=case.projections[701:],
        reads=case.reads[701:],
        block_table=case.block_table[2:],
        query_start_loc=torch.tensor([0, 300], dtype=torch.int32),
        seq_lens=case.seq_lens[2:],
    )
    assert torch.equal(run(alone, place).reads[:300], first.reads[701:1001])


@on_gpu
def test_decode_makes_no_host_sync(place):
    case = make_case(DeltaRuleSpec(8, 1), [1] * 4, [9] * 4).to("cuda")
    delta_rule_paged(*case.arguments(), **case.options())
    torch.cuda.set_sync_debug_mode("error")
    try:
        delta_rule_paged(*case.arguments(), **case.options())
    finally:
        torch.cuda.set_sync_debug_mode("default")
