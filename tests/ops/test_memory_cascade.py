"""Merging by log-sum-exp, attention over memory alone on a CPU, and the choice of a route."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mem_triton.ops.memory_attention import FOREVER, memory_attention
from mem_triton.ops.memory_attention.cascade.memory_only import add_memory, memory_only_attention
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.policy import Policy, choose
from mem_triton.ops.tuning.memory_attention import THRESHOLDS, thresholds
from tests.ops.attention_case import FP8, INT8, NAN, AttentionCase, assert_matches, expected, make_case
from tests.ops.cascade_case import (
    assert_close,
    assert_same_bits,
    memory_expected,
    merged,
    untouched_tokens,
)

State = tuple[Tensor, Tensor]
SPREADS = st.sampled_from([0.0, 1.0, 30.0, 1e4])


def state(seed: int, spread: float = 1.0, dtype: torch.dtype = torch.float32, blind: float = 0.3) -> State:
    """A partial softmax: output [5, 3, 8] and LSE [5, 3]; a share of ``blind`` saw no key, and its output is NaN."""
    g = torch.Generator().manual_seed(seed)
    lse = torch.randn(5, 3, generator=g) * spread  # spread 0 has zeros of both signs
    lse[torch.rand(5, 3, generator=g) < blind] = -torch.inf
    out = torch.randn(5, 3, 8, generator=g) * (torch.rand(5, 3, 8, generator=g) < 0.9)
    out = out.masked_fill((lse == -torch.inf).unsqueeze(-1), NAN)
    return out.to(dtype), lse


def merge(a: State, b: State, dtype: torch.dtype | None = None) -> State:
    out, lse = torch.full_like(a[0], NAN, dtype=dtype or a[0].dtype), torch.full_like(a[1], NAN)
    merge_states(*a, *b, out, lse)
    return out, lse


def as_double(x: State) -> State:
    return x[0].double(), x[1].double()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), spread=SPREADS)
def test_merging_is_commutative_bit_by_bit(seed, spread):
    a, b = state(seed, spread), state(seed + 1, spread)
    for x, y in zip(merge(a, b), merge(b, a), strict=True):
        assert_same_bits(x, y)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), spread=SPREADS)
def test_merging_is_associative(seed, spread):
    a, b, c = (as_double(state(seed + i, spread)) for i in range(3))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert torch.equal(left[1] == -torch.inf, right[1] == -torch.inf)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12 * max(1.0, spread))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), spread=SPREADS, word=st.sampled_from([-torch.inf, torch.inf]))
def test_no_keys_are_the_identity_whatever_their_output(seed, spread, word):
    a = state(seed, spread, torch.bfloat16, blind=0.0)
    nothing = (torch.full_like(a[0], NAN), torch.full_like(a[1], word))
    for out, lse in (merge(a, nothing), merge(nothing, a)):
        assert_same_bits(out, a[0])
        assert_same_bits(lse, a[1])
    out, lse = merge(nothing, nothing)
    assert (out == 0).all() and (lse == -torch.inf).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 12), spread=st.sampled_from([1.0, 20.0]))
def test_two_halves_of_the_keys_merge_to_all_of_them(seed, cut, spread):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, 12, generator=g, dtype=torch.float64) * spread
    values = torch.randn(12, 8, generator=g, dtype=torch.float64)

    def part(keys: slice) -> State:
        x = logits[..., keys]
        return (torch.softmax(x, -1) @ values[keys]).nan_to_num(), torch.logsumexp(x, -1)

    torch.testing.assert_close(merge(part(slice(0, cut)), part(slice(cut, 12))), part(slice(0, 12)))


def test_merging_in_place_and_into_another_dtype():
    a, b = state(3), state(4)
    want = merge(a, b)
    out, lse = a[0].clone(), a[1].clone()
    merge_states(out, lse, *b, out, lse)
    assert_same_bits(out, want[0])
    assert_same_bits(lse, want[1])
    merge_states(*a, out.copy_(b[0]), lse.copy_(b[1]), out)  # no LSE wanted
    assert_same_bits(out, want[0])
    assert_same_bits(merge(a, b, torch.bfloat16)[0], want[0].bfloat16())


def test_a_tensor_that_does_not_fit_is_named():
    a, b = state(0), state(1)
    with pytest.raises(ValueError, match="lse_b: "):
        merge_states(*a, b[0], b[1][:4], a[0])
    with pytest.raises(ValueError, match="out_a: the last dimension"):
        merge_states(a[0].transpose(1, 2).contiguous().transpose(1, 2), a[1], *b, b[0])


MIXED = [(3, 5), (1, 9), (0, 3), (2, 0), (1, 30)]
PAGES = [[(8, 0, FOREVER), (3, 0, 6)], None, None, [(5, 0, 1), (0, 0, FOREVER)], []]
RANGES = [(0, 6), (0, 1), (0, 1), (1, FOREVER), (7, 9)]
KINDS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, FP8), (torch.bfloat16, INT8)]


def mixed_case(**changes) -> AttentionCase:
    arguments = {"memories": PAGES, "shared": 21, "shared_range": RANGES, "padding_tokens": 2, **changes}
    return make_case(MIXED, **arguments)


@pytest.mark.parametrize("dtype,page_dtype", KINDS)
@pytest.mark.parametrize("size", [32, 80, 96])
def test_memory_only_matches_fp64(dtype, page_dtype, size):
    case = mixed_case(heads=(6, 2), size=size, dtype=dtype, page_dtype=page_dtype, bias=True, soft_cap=4.0)
    want = memory_expected(case)
    out, lse = memory_only_attention(case.memory_call())
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, lse, want)
    blind = untouched_tokens(case, want)
    assert blind[-2:].all() and (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()


def test_an_error_beyond_the_budget_is_seen():
    """Negative control: a weight or a log-sum-exp that is off by a few units in the last place of bf16."""
    case = mixed_case()
    want = memory_expected(case)
    out, lse = want.out.float(), want.lse.float()
    assert_close(out, lse, want)
    for spoiled in ((out * (1 + 2.0**-12), lse), (out, lse + 2.0**-14), (out.roll(1, 1), lse)):
        with pytest.raises(AssertionError, match="budgets"):
            assert_close(*spoiled, want)


@pytest.mark.parametrize("parts", [("pages",), ("shared",), ("pages", "shared")])
def test_memory_in_parts(parts):
    case = mixed_case()
    left_out = dict.fromkeys({"pages", "shared"} - set(parts))
    want = memory_expected(case, pages="pages" in parts, shared="shared" in parts)
    table = case.table if "pages" in parts else None
    assert_close(*memory_only_attention(case.memory_call(**left_out, table=table)), want)


@pytest.mark.parametrize("dtype,page_dtype", KINDS)
def test_memory_added_to_another_backend_is_one_softmax(dtype, page_dtype):
    """Route (c): any context with an LSE, then memory; the sinks are the context's."""
    case = mixed_case(dtype=dtype, page_dtype=page_dtype, sinks=True, shared_bias=0.5)
    context = case.without_memory()
    memory_attention(context.call())
    flash_lse = context.lse.t().contiguous()  # as FlashAttention has it
    out = context.out.clone()
    add_memory(case.memory_call(out, flash_lse.t()))
    want = expected(case)
    twice = torch.finfo(dtype).eps * context.out.double().abs().nan_to_num()  # the context was rounded on its own
    assert_matches(replace(case, out=out, lse=flash_lse.t()), replace(want, out_budget=2 * want.out_budget + twice))
    blind = untouched_tokens(case, memory_expected(case))
    assert_same_bits(out[blind], context.out[blind])
    assert_same_bits(flash_lse.t()[blind], context.lse[blind])
    assert not torch.equal(out[~blind], context.out[~blind])


def test_memory_over_an_empty_context_of_poison():
    case = mixed_case()
    memory = memory_expected(case)
    out, lse = torch.full_like(case.query, NAN), torch.full(case.query.shape[:2], torch.inf)
    add_memory(case.memory_call(out, lse))
    assert_close(out, lse, merged(case, torch.full_like(out, NAN), torch.full_like(lse, torch.inf), memory))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"pages": None, "shared": None}, "pages: neither"),
        ({"table": None}, "table: needed"),
        ({"lse": torch.zeros(3, 3)}, "lse: "),
        ({"lse": None}, "lse: None"),
        ({"row_slot": torch.zeros(2, dtype=torch.int32)}, "row_slot: shape"),
        ({"row_slot": None}, "row_slot, sinks: "),
        ({"sinks": torch.zeros(4)}, "row_slot, sinks: "),
        ({"context": make_case(MIXED).context}, "context: "),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    case = mixed_case()
    with pytest.raises(ValueError, match=message):
        add_memory(case.memory_call(case.out, case.lse)._replace(**change))


def route(**changes) -> str:
    shapes = {"rows": 64, "shared_tokens": 12800, "head_dim": 128, **changes}
    return choose("sm90", **shapes).route


def test_policy_batches_the_shared_segment_where_it_saves_reading():
    assert route() == "shared_batched"
    assert route(rows=1) == "fused"  # nobody else to share it with
    assert route(shared_tokens=0) == "fused"
    assert route(shared_tokens=64, rows=1000) == "fused"  # a constant prefix is too short for a launch of its own


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.integers(1, 512), tokens=st.integers(0, 20_000), more=st.integers(0, 5_000))
def test_more_to_save_never_turns_the_policy_back(rows, tokens, more):
    if route(rows=rows, shared_tokens=tokens) == "shared_batched":
        assert route(rows=rows + more, shared_tokens=tokens + more) == "shared_batched"


def test_policy_sees_host_integers_alone():
    """Nothing on the device may steer it: a captured graph could not follow."""
    kinds = {p.annotation for p in inspect.signature(choose).parameters.values()}
    assert kinds == {"str", "int"}
    assert thresholds("a GPU of 2030") in THRESHOLDS.values()


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="route='fast': expected one of fused, shared_batched"):
        Policy("fast")
