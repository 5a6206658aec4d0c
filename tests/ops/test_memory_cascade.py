"""Merging by log-sum-exp, attention over memory alone wherever it runs, the cascade, and the choice of a route.

In the interpreter memory is watched, races are looked for, and everything unread is poisoned.
"""

from __future__ import annotations

import inspect
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mem_triton.ops.memory_attention import FOREVER, memory_attention
from mem_triton.ops.memory_attention.cascade import batched
from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
from mem_triton.ops.memory_attention.cascade.memory_only import add_memory, memory_only_attention
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.fused import launch
from mem_triton.ops.memory_attention.policy import Policy, choose
from mem_triton.ops.tuning.memory_attention import THRESHOLDS, thresholds
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig
from tests.ops.attention_case import FP8, INT8, NAN, AttentionCase, assert_matches, expected, make_case, to_device
from tests.ops.cascade_case import (
    assert_close,
    assert_same_bits,
    memory_expected,
    merged,
    untouched_tokens,
)
from tests.support.interp import sanitize
from tests.support.places import by_kernels, device_of, interpreted, ways_of

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


# --- the kernels of the cascade, and what a CPU does in their place --------------------------------------------------

WHOLE = FusedConfig(block_m=16, tile=16, warps=4, stages=1, programs=1)
SPLIT = replace(WHOLE, programs=256, min_tiles=1, max_splits=3)
WAYS = {"cpu": ("cpu", None), "whole": ("interpreter", WHOLE), "split": ("interpreter", SPLIT), "gpu": ("gpu", None)}
ways = ways_of(WAYS)
every_way = ways(*WAYS)

ALL_KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16-fp8": (torch.float16, FP8),
    "bf16-int8": (torch.bfloat16, INT8),
    "bf16-fp8": (torch.bfloat16, FP8),
}


def kernel_case(kind: str = "fp32", **changes) -> AttentionCase:
    dtype, page_dtype = ALL_KINDS[kind]
    arguments = {"memories": PAGES, "shared": 37, "shared_range": RANGES, "padding_tokens": 2, "dtype": dtype}
    return make_case(**{"rows": MIXED, "page_dtype": page_dtype, **arguments, **changes})


def some_state(case: AttentionCase, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Another kernel's output and LSE: some rows saw no key and hold poison, in either word for it."""
    g = torch.Generator().manual_seed(seed)
    lse = torch.randn(case.query.shape[:2], generator=g) * 3
    lse[0, 0], lse[-1, -1] = -torch.inf, torch.inf
    out = torch.randn(case.query.shape, generator=g).masked_fill(lse.isinf().unsqueeze(-1), NAN)
    return out.to(case.query.dtype), lse


def left(
    case: AttentionCase, place: str, config: FusedConfig | None, order: str, part: str, out: Tensor, lse: Tensor
) -> State:
    """The runner: what is left of another kernel's output when memory is merged into it. part: "shared" or "pages".

    config: of the kernel in the interpreter, where no finding may be made; the usual one on a GPU.
    """
    other = {"pages": None, "table": None} if part == "shared" else {"shared": None}
    if place == "cpu":
        add_memory(case.memory_call(out, lse, **other))
        return out, lse
    if place == "gpu":
        out, lse, case = out.cuda(), lse.cuda(), to_device(case)
    call = case.memory_call(out, lse, **other)
    with sanitize(order) if place == "interpreter" else nullcontext([]) as findings:
        if part == "shared":
            cascade_launch.attend_shared(call, config)
        else:
            cascade_launch.attend_pages(call, True, config)
    assert not findings, "\n".join(findings)
    return out.cpu(), lse.cpu()


def alone(case: AttentionCase, place: str, config: FusedConfig | None, order: str) -> State:
    """The same of attention over the pages that is merged into nothing."""
    if place == "cpu":
        return memory_only_attention(case.memory_call(shared=None))
    case = to_device(case, device_of(place))
    out, lse = torch.full_like(case.query, NAN), torch.full_like(case.query[..., 0], NAN, dtype=torch.float32)
    with sanitize(order) if place == "interpreter" else nullcontext([]) as findings:
        cascade_launch.attend_pages(case.memory_call(out, lse), False, config)
    assert not findings, "\n".join(findings)
    return out.cpu(), lse.cpu()


def check_merged(
    part: str, case: AttentionCase, place: str, config: FusedConfig | None, order: str = "forward", lse_by_head=False
) -> None:
    want = memory_expected(case, **{"pages": part == "pages", "shared": part == "shared"})
    before, before_lse = some_state(case)
    out, lse = before.clone(), before_lse.clone()
    if lse_by_head:
        lse = lse.t().contiguous().t()
    out, lse = left(case, place, config, order, part, out, lse)
    assert_close(out, lse, merged(case, before, before_lse, want))
    blind = untouched_tokens(case, want)
    assert_same_bits(out[blind], before[blind])
    assert_same_bits(lse[blind], before_lse[blind])


def check_shared(case: AttentionCase, place: str, config: FusedConfig | None, order: str = "forward", **more) -> None:
    check_merged("shared", case, place, config, order, **more)


def check_pages(
    case: AttentionCase, place: str, config: FusedConfig | None, order: str = "forward", merge: bool = False
) -> None:
    if merge:
        check_merged("pages", case, place, config, order)
    else:
        assert_close(*alone(case, place, config, order), memory_expected(case, shared=False))


@every_way
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_shared_segment_of_every_type(place, config, kind):
    check_shared(kernel_case(kind, soft_cap=3.0, shared_bias=0.7), place, config, "reverse")


@pytest.mark.parametrize("merge", [False, True], ids=["alone", "merged"])
@every_way
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pages_of_every_type(place, config, kind, merge):
    check_pages(kernel_case(kind, soft_cap=3.0, bias=True), place, config, "reverse", merge)


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 256])
@ways("cpu", "split", "gpu")
def test_every_head_size(place, config, size):
    kind = "bf16-int8" if size % 32 else "bf16"
    check_shared(kernel_case(kind, size=size), place, config, "shuffle")
    check_pages(kernel_case(kind, size=size), place, config, "shuffle")


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1), (16, 1), (40, 2)])
@ways("cpu", "whole", "gpu")
def test_every_group_of_query_heads(place, config, heads):
    """Groups that do not divide a block of rows straddle blocks in one kernel and leave rows idle in the other."""
    check_shared(kernel_case(heads=heads), place, config, lse_by_head=True)
    check_pages(kernel_case(heads=heads), place, config)


@pytest.mark.parametrize("page_size", [16, 64])
@ways("cpu", "split", "gpu")
def test_page_sizes(place, config, page_size):
    memories = [[(page_size, 0, FOREVER), (page_size - 3, 0, 9)], None, None, [(1, 0, FOREVER)] * 3, []]
    check_pages(kernel_case("bf16-fp8", memories=memories, page_size=page_size), place, config)


@ways("cpu", "split", "gpu")
def test_splits_that_end_inside_a_tile(place, config):
    """Three pages of 5 tokens a split and 16 tokens a step: nobody may take keys of the next split as well."""
    memories = [[(5, 0, FOREVER)] * 7, None, None, [(4, 0, FOREVER)] * 4, []]
    check_pages(kernel_case(memories=memories, page_size=5), place, config, "shuffle")


@ways("cpu", "split", "gpu")
def test_large_logits_do_not_overflow(place, config):
    case = kernel_case(spread=12.0)
    check_shared(case, place, config)
    check_pages(case, place, config, merge=True)


@ways("cpu", "split", "gpu")
def test_extreme_scales_of_8_bit_keys_survive_fp16(place, config):
    """The channels' scales ride on the query, which fp16 could neither hold at 1e5 nor tell from 0 at 1e-8."""
    for factor in (1e-6, 1e4):
        case = kernel_case("fp16-fp8")
        case.shared = case.shared._replace(key_scale=case.shared.key_scale * factor)
        case.scale /= factor
        check_shared(case, place, config)


@ways("cpu", "split", "gpu")
def test_a_batch_of_nobody_touches_nothing(place, config):
    case = kernel_case(shared_range=[(0, 0)] * 5, memories=[[], None, None, [], []])
    check_shared(case, place, config)
    check_pages(case, place, config, merge=True)
    check_pages(case, place, config)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
@interpreted
def test_a_workspace_serves_launch_after_launch(place, order):
    """A captured graph replays with the counters that the last launch left."""
    case = kernel_case("bf16")
    workspace = launch.workspace_for(case.query.device, SPLIT, case.query.shape[2])
    results = []
    for _ in range(2):
        out, lse = some_state(case)
        with sanitize(order) as findings:
            call = case.memory_call(out, lse)
            cascade_launch.attend_pages(call, True, SPLIT, workspace)
            cascade_launch.attend_shared(call, SPLIT, workspace)
        assert not findings, "\n".join(findings)
        assert (workspace.counter == 0).all()
        results.append((out, lse))
    for first, second in zip(*results, strict=True):
        assert_same_bits(first.nan_to_num(7), second.nan_to_num(7))


@interpreted
def test_a_counter_that_is_not_reset_would_be_seen(place):
    """Negative control: whoever starts from another count than zero finds no last program, and nothing is written."""
    case = kernel_case()
    workspace = launch.workspace_for(case.query.device, SPLIT, case.query.shape[2])
    workspace.counter.fill_(1)
    before, before_lse = some_state(case)
    out, lse = before.clone(), before_lse.clone()
    cascade_launch.attend_shared(case.memory_call(out, lse), replace(SPLIT, max_splits=2), workspace)
    with pytest.raises(AssertionError):
        assert_close(out, lse, merged(case, before, before_lse, memory_expected(case, pages=False)))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-fp8"])
@interpreted
def test_cascade_is_one_softmax(place, kind):
    """Route (b): the fused kernel without the shared segment, then the segment for all rows; sinks enter once."""
    case = kernel_case(kind, sinks=True, bias=True)
    own = replace(case.fresh(), shared=None)
    fused = replace(SPLIT, tile=16)
    launch.attend(own.call(), config=fused)
    out, lse = own.out.clone(), own.lse.clone()
    cascade_launch.attend_shared(case.memory_call(out, lse), SPLIT)
    want = expected(case)
    twice = torch.finfo(out.dtype).eps * own.out.double().abs().nan_to_num()
    live = ~want.lse.isnan().any(1)
    assert_close(out, lse, replace(want, out_budget=2 * want.out_budget + twice), live)
    blind = untouched_tokens(case, memory_expected(case, pages=False))
    assert_same_bits(out[blind], own.out[blind])
    whole = case.fresh()  # route (a), in one kernel
    launch.attend(whole.call(), config=fused)
    torch.testing.assert_close(out[live].float(), whole.out[live].float(), atol=4 * torch.finfo(out.dtype).eps, rtol=0)


@pytest.mark.parametrize("architecture", ["sm80", "sm90", "gfx942"])
@interpreted
def test_cascade_with_the_tables_that_serve(place, architecture, monkeypatch):
    """``batched.attend`` as the op calls it, and the memory-only kernel, with the configurations of the tables."""
    for module in (launch, cascade_launch):
        monkeypatch.setattr(module, "architecture", lambda device: architecture)
    batch = {"rows": [(1, 9), (1, 30), (1, 4)], "memories": [PAGES[0], None, []]}
    case = kernel_case("bf16-fp8", shared=300, shared_range=[(0, FOREVER), (0, 1), (2, 9)], sinks=True, **batch)
    with sanitize("shuffle") as findings:
        batched.attend(case.call())
    assert not findings, "\n".join(findings)
    want = expected(case)
    live = ~want.lse.isnan().any(1)
    twice = torch.finfo(torch.bfloat16).eps * case.context.values.double().nan_to_num().abs().max()
    assert_close(case.out, case.lse, replace(want, out_budget=2 * want.out_budget + twice), live)
    check_pages(case, place, None, merge=True)


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_kernels
def test_merge_kernel_is_the_torch_merge(place, size, dtype):
    case = kernel_case(heads=(3, 1), size=size)
    a, b = ((out.to(dtype), lse) for out, lse in (some_state(case, 1), some_state(case, 2)))
    b[1][2:5] = -torch.inf
    a[1][4] = torch.inf
    want, want_lse = torch.full_like(a[0], NAN), torch.full_like(a[1], NAN)
    merge_states(*a, *b, want, want_lse)
    device = device_of(place)
    a, b = ([x.to(device) for x in one] for one in (a, b))
    wide = torch.full((len(want), 3, size + 5), NAN, dtype=dtype, device=device)
    for out, lse in ((wide[..., :size], torch.full_like(a[1], NAN).t().contiguous().t()), (a[0], a[1])):
        with sanitize("shuffle") if place == "interpreter" else nullcontext([]) as findings:
            cascade_launch.merge(*a, *b, out, lse)
        assert not findings, "\n".join(findings)
        torch.testing.assert_close(out.cpu(), want, atol=2 * torch.finfo(dtype).eps, rtol=0)
        torch.testing.assert_close(lse.cpu(), want_lse, atol=1e-6, rtol=1e-6)
    assert wide[..., size:].isnan().all()
    assert_same_bits(out[2:4].cpu(), want[2:4])


batches = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=4)


@ways("cpu", "split", "gpu")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=batches,
    kind=st.sampled_from(list(ALL_KINDS)),
    shape=st.sampled_from([((4, 2), 32, 8), ((3, 1), 80, 16), ((2, 2), 32, 1), ((6, 2), 48, 5)]),
    seed=st.integers(0, 1000),
    interpreted_config=st.sampled_from([WHOLE, SPLIT, replace(SPLIT, block_m=32)]),
)
def test_any_batch(place, config, rows, kind, shape, seed, interpreted_config):
    pick, (heads, size, page_size) = random.Random(seed), shape

    def window() -> tuple[int, int]:
        begin = pick.randint(0, 10)
        return begin, pick.choice([begin, begin + pick.randint(1, 8), FOREVER])

    memories = [
        None if pick.random() < 0.3 else [(pick.randint(0, page_size), *window()) for _ in range(pick.randint(0, 4))]
        for _ in rows
    ]
    case = kernel_case(
        kind,
        rows=rows,
        memories=memories,
        heads=heads,
        size=size,
        page_size=page_size,
        seed=seed,
        shared=pick.randint(1, 40),
        shared_range=[window() for _ in rows],
        padding_tokens=pick.randint(0, 2),
        soft_cap=pick.choice([0.0, 5.0]),
        bias=pick.random() < 0.5,
    )
    if len(case.query) == 0:
        return
    order = pick.choice(["forward", "reverse", "shuffle"])
    config = config and interpreted_config
    check_shared(case, place, config, order)
    check_pages(case, place, config, order, merge=pick.random() < 0.5)
