"""The cascade's kernels against fp64, with memory watched, races looked for and everything unread poisoned."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mem_triton.ops.memory_attention import FOREVER
from mem_triton.ops.memory_attention.cascade import batched
from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from mem_triton.ops.memory_attention.fused import launch
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig
from tests.ops.attention_case import FP8, INT8, NAN, AttentionCase, expected, make_case
from tests.ops.cascade_case import (
    assert_close,
    assert_same_bits,
    memory_expected,
    merged,
    untouched_tokens,
)
from tests.support.interp import sanitize

WHOLE = FusedConfig(block_m=16, tile=16, warps=4, stages=1, programs=1)
SPLIT = replace(WHOLE, programs=256, min_tiles=1, max_splits=3)
CONFIGS = {"whole": WHOLE, "split": SPLIT}

ROWS = [(3, 5), (1, 9), (0, 3), (2, 0), (1, 30)]
PAGES = [[(8, 0, FOREVER), (3, 0, 6)], None, None, [(5, 0, 1), (0, 0, FOREVER)], []]
RANGES = [(0, 6), (0, 1), (0, 1), (1, FOREVER), (7, 9)]
KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16-fp8": (torch.float16, FP8),
    "bf16-int8": (torch.bfloat16, INT8),
    "bf16-fp8": (torch.bfloat16, FP8),
}


def mixed_case(kind: str = "fp32", **changes) -> AttentionCase:
    dtype, page_dtype = KINDS[kind]
    arguments = {"memories": PAGES, "shared": 37, "shared_range": RANGES, "padding_tokens": 2, "dtype": dtype}
    return make_case(**{"rows": ROWS, "page_dtype": page_dtype, **arguments, **changes})


def some_state(case: AttentionCase, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Another kernel's output and LSE: some rows saw no key and hold poison, in either word for it."""
    g = torch.Generator().manual_seed(seed)
    lse = torch.randn(case.query.shape[:2], generator=g) * 3
    lse[0, 0], lse[-1, -1] = -torch.inf, torch.inf
    out = torch.randn(case.query.shape, generator=g).masked_fill(lse.isinf().unsqueeze(-1), NAN)
    return out.to(case.query.dtype), lse


def check_shared(case: AttentionCase, config: FusedConfig = SPLIT, order: str = "forward", lse_by_head=False) -> None:
    want = memory_expected(case, pages=False)
    before, before_lse = some_state(case)
    out, lse = before.clone(), before_lse.clone()
    if lse_by_head:
        lse = lse.t().contiguous().t()
    with sanitize(order) as findings:
        cascade_launch.attend_shared(case.memory_call(out, lse), config)
    assert not findings, "\n".join(findings)
    assert_close(out, lse, merged(case, before, before_lse, want))
    blind = untouched_tokens(case, want)
    assert_same_bits(out[blind], before[blind])
    assert_same_bits(lse[blind], before_lse[blind])


def check_pages(
    case: AttentionCase, config: FusedConfig | None = SPLIT, order: str = "forward", merge: bool = False
) -> None:
    want = memory_expected(case, shared=False)
    before, before_lse = some_state(case)
    out, lse = (x.clone() if merge else torch.full_like(x, NAN) for x in (before, before_lse))
    with sanitize(order) as findings:
        cascade_launch.attend_pages(case.memory_call(out, lse), merge, config)
    assert not findings, "\n".join(findings)
    assert_close(out, lse, merged(case, before, before_lse, want) if merge else want)
    if merge:
        blind = untouched_tokens(case, want)
        assert_same_bits(out[blind], before[blind])
        assert_same_bits(lse[blind], before_lse[blind])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_segment_of_every_type(config, kind):
    check_shared(mixed_case(kind, soft_cap=3.0, shared_bias=0.7), CONFIGS[config], "reverse")


@pytest.mark.parametrize("merge", [False, True], ids=["alone", "merged"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_every_type(config, kind, merge):
    check_pages(mixed_case(kind, soft_cap=3.0, bias=True), CONFIGS[config], "reverse", merge)


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 256])
def test_every_head_size(size):
    kind = "bf16-int8" if size % 32 else "bf16"
    check_shared(mixed_case(kind, size=size), order="shuffle")
    check_pages(mixed_case(kind, size=size), order="shuffle")


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1), (16, 1), (40, 2)])
def test_every_group_of_query_heads(heads):
    """Groups that do not divide a block of rows straddle blocks in one kernel and leave rows idle in the other."""
    check_shared(mixed_case(heads=heads), WHOLE, lse_by_head=True)
    check_pages(mixed_case(heads=heads), WHOLE)


@pytest.mark.parametrize("page_size", [16, 64])
def test_page_sizes(page_size):
    memories = [[(page_size, 0, FOREVER), (page_size - 3, 0, 9)], None, None, [(1, 0, FOREVER)] * 3, []]
    check_pages(mixed_case("bf16-fp8", memories=memories, page_size=page_size))


def test_splits_that_end_inside_a_tile():
    """Three pages of 5 tokens a split and 16 tokens a step: nobody may take keys of the next split as well."""
    memories = [[(5, 0, FOREVER)] * 7, None, None, [(4, 0, FOREVER)] * 4, []]
    check_pages(mixed_case(memories=memories, page_size=5), order="shuffle")


def test_large_logits_do_not_overflow():
    case = mixed_case(spread=12.0)
    check_shared(case)
    check_pages(case, merge=True)


def test_extreme_scales_of_8_bit_keys_survive_fp16():
    """The channels' scales ride on the query, which fp16 could neither hold at 1e5 nor tell from 0 at 1e-8."""
    for factor in (1e-6, 1e4):
        case = mixed_case("fp16-fp8")
        case.shared = case.shared._replace(key_scale=case.shared.key_scale * factor)
        case.scale /= factor
        check_shared(case)


def test_a_batch_of_nobody_touches_nothing():
    case = mixed_case(shared_range=[(0, 0)] * 5, memories=[[], None, None, [], []])
    check_shared(case)
    check_pages(case, merge=True)
    check_pages(case)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_a_workspace_serves_launch_after_launch(order):
    """A captured graph replays with the counters that the last launch left."""
    case = mixed_case("bf16")
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


def test_a_counter_that_is_not_reset_would_be_seen():
    """Negative control: whoever starts from another count than zero finds no last program, and nothing is written."""
    case = mixed_case()
    workspace = launch.workspace_for(case.query.device, SPLIT, case.query.shape[2])
    workspace.counter.fill_(1)
    before, before_lse = some_state(case)
    out, lse = before.clone(), before_lse.clone()
    cascade_launch.attend_shared(case.memory_call(out, lse), replace(SPLIT, max_splits=2), workspace)
    with pytest.raises(AssertionError):
        assert_close(out, lse, merged(case, before, before_lse, memory_expected(case, pages=False)))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-fp8"])
def test_cascade_is_one_softmax(kind):
    """Route (b): the fused kernel without the shared segment, then the segment for all rows; sinks enter once."""
    case = mixed_case(kind, sinks=True, bias=True)
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
def test_cascade_with_the_tables_that_serve(architecture, monkeypatch):
    """``batched.attend`` as the op calls it, and the memory-only kernel, with the configurations of the tables."""
    for module in (launch, cascade_launch):
        monkeypatch.setattr(module, "architecture", lambda device: architecture)
    batch = {"rows": [(1, 9), (1, 30), (1, 4)], "memories": [PAGES[0], None, []]}
    case = mixed_case("bf16-fp8", shared=300, shared_range=[(0, FOREVER), (0, 1), (2, 9)], sinks=True, **batch)
    with sanitize("shuffle") as findings:
        batched.attend(case.call())
    assert not findings, "\n".join(findings)
    want = expected(case)
    live = ~want.lse.isnan().any(1)
    twice = torch.finfo(torch.bfloat16).eps * case.context.values.double().nan_to_num().abs().max()
    assert_close(case.out, case.lse, replace(want, out_budget=2 * want.out_budget + twice), live)
    check_pages(case, config=None, merge=True)


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_kernel_is_the_torch_merge(size, dtype):
    case = mixed_case(heads=(3, 1), size=size)
    a, b = ((out.to(dtype), lse) for out, lse in (some_state(case, 1), some_state(case, 2)))
    b[1][2:5] = -torch.inf
    a[1][4] = torch.inf
    want, want_lse = torch.full_like(a[0], NAN), torch.full_like(a[1], NAN)
    merge_states(*a, *b, want, want_lse)
    wide = torch.full((len(want), 3, size + 5), NAN, dtype=dtype)
    for out, lse in ((wide[..., :size], torch.full_like(want_lse, NAN).t().contiguous().t()), (a[0], a[1])):
        with sanitize("shuffle") as findings:
            cascade_launch.merge(*a, *b, out, lse)
        assert not findings, "\n".join(findings)
        torch.testing.assert_close(out, want, atol=2 * torch.finfo(dtype).eps, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)
    assert wide[..., size:].isnan().all()
    assert_same_bits(out[2:4], want[2:4])


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=4)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=rows,
    kind=st.sampled_from(list(KINDS)),
    shape=st.sampled_from([((4, 2), 32, 8), ((3, 1), 80, 16), ((2, 2), 32, 1), ((6, 2), 48, 5)]),
    seed=st.integers(0, 1000),
    config=st.sampled_from([WHOLE, SPLIT, replace(SPLIT, block_m=32)]),
)
def test_any_batch(rows, kind, shape, seed, config):
    pick, (heads, size, page_size) = random.Random(seed), shape

    def window() -> tuple[int, int]:
        begin = pick.randint(0, 10)
        return begin, pick.choice([begin, begin + pick.randint(1, 8), FOREVER])

    memories = [
        None if pick.random() < 0.3 else [(pick.randint(0, page_size), *window()) for _ in range(pick.randint(0, 4))]
        for _ in rows
    ]
    case = mixed_case(
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
    check_shared(case, config, order)
    check_pages(case, config, order, merge=pick.random() < 0.5)
