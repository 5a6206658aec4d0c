"""Memory attention on a real GPU: all three routes against fp64, in CUDA graphs, bit-stable, without a host sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mem_triton.ops.memory_attention import FOREVER, Policy, add_memory, memory_attention, memory_only_attention
from mem_triton.ops.memory_attention.cascade.merge import merge_states
from tests.ops.attention_case import FP8, INT8, AttentionCase, assert_matches, expected, make_case, to_device
from tests.ops.cascade_case import assert_close, assert_same_bits, memory_expected, untouched_tokens
from tests.support.pairwise import pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PAGES = [[(8, 0, FOREVER), (3, 0, 64)], None, [(5, 0, FOREVER)], [], [(8, 2, 90)] * 9, None, [(1, 0, 1)], []]
ROWS = {  # new tokens, tokens before
    "decode": [(1, n) for n in (5, 9, 0, 33, 80, 700, 3, 64)],
    "mixed": [(1, 9), (40, 5), (0, 3), (1, 200), (130, 40), (2, 0), (17, 17), (1, 0)],
}
KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-fp8": (torch.bfloat16, FP8),
    "fp16-fp8": (torch.float16, FP8),
    "bf16-int8": (torch.bfloat16, INT8),
}
ROUTES = ("fused", "shared_batched", "stock_context")


def make(batch: str = "mixed", kind: str = "bf16", **changes) -> AttentionCase:
    dtype, page_dtype = KINDS[kind]
    windows = [(0, FOREVER), (0, 1), (0, 1), (3, 40), (0, FOREVER), (0, 1), (0, 0), (0, FOREVER)]
    arguments = {"memories": PAGES, "shared": 700, "shared_range": windows, "padding_tokens": 3, "heads": (8, 2)}
    return make_case(ROWS[batch], dtype=dtype, page_dtype=page_dtype, **{**arguments, **changes})


def attend(case: AttentionCase, route: str) -> None:
    """Write ``case.out`` and ``case.lse`` by one of the routes; the stock context is this op without memory."""
    if route != "stock_context":
        memory_attention(case.call(), policy=Policy(route))
        return
    memory = {"row_slot": None, "pages": None, "table": None, "shared": None}
    memory_attention(case.call(**memory), policy=Policy("fused"))
    add_memory(case.memory_call(case.out, case.lse))


def run(case: AttentionCase, route: str) -> AttentionCase:
    on_gpu = to_device(case)
    attend(on_gpu, route)
    torch.cuda.synchronize()
    return to_device(on_gpu, "cpu")


def check(case: AttentionCase, route: str) -> None:
    want = expected(case)
    if route != "fused":  # the context is rounded on its own before memory is merged into it
        largest = case.context.values.double().nan_to_num().abs().max()
        want = replace(want, out_budget=2 * want.out_budget + torch.finfo(case.query.dtype).eps * largest)
        want = replace(want, lse_budget=2 * want.lse_budget)
    assert_matches(run(case, route), want)


@pairs({"batch": list(ROWS), "kind": list(KINDS), "route": ROUTES})
def test_matches_fp64(batch, kind, route):
    check(make(batch, kind, bias=True, sinks=True, soft_cap=8.0), route)


@pairs({"kind": ["fp32", "bf16", "bf16-fp8"], "size": [32, 64, 80, 96, 128, 192, 256], "route": ROUTES})
def test_every_head_size(size, kind, route):
    check(make(kind=kind, size=size), route)


@pairs(
    {
        "layout": ["packed", "tokens_first", "heads_first"],
        "heads": [(2, 2), (5, 1), (40, 8), (32, 2)],
        "route": ROUTES,
    }
)
def test_groups_and_layouts(heads, layout, route):
    check(make(heads=heads, layout=layout, size=64), route)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", ROWS)
def test_memory_alone_matches_fp64_and_merges(batch, kind):
    case = make(batch, kind, bias=True)
    on_gpu = to_device(case)
    out, lse = memory_only_attention(on_gpu.memory_call())
    want = memory_expected(case)
    twice = torch.finfo(out.dtype).eps * want.out.abs().amax()  # pages and segment are merged after a rounding
    want = replace(want, out_budget=2 * want.out_budget + twice, lse_budget=2 * want.lse_budget)
    assert_close(out.cpu(), lse.cpu(), want)
    result, result_lse = torch.empty_like(out), torch.empty_like(lse)
    merge_states(torch.full_like(out, torch.nan), torch.full_like(lse, torch.inf), out, lse, result, result_lse)
    seen = (lse > -torch.inf).all(1)
    assert_same_bits(result[seen].cpu(), out[seen].cpu())
    assert (result[~seen] == 0).all() and torch.equal(result_lse, lse)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("batch", ROWS)
def test_rows_without_memory_have_the_bits_of_a_call_without(batch, route):
    case = make(batch)
    plain, after = run(case.without_memory(), "fused"), run(case, route)
    none = untouched_tokens(case, memory_expected(case))
    live = torch.arange(len(none)) < int(case.context.query_start_loc[-1])
    assert (none & live).any()
    assert_same_bits(after.out[none & live], plain.out[none & live])
    assert_same_bits(after.lse[none & live], plain.lse[none & live])
    assert after.out[~live].isnan().all() and after.lse[~live].isnan().all()  # padding


@pairs({"batch": list(ROWS), "kind": ["bf16", "bf16-fp8"], "route": ROUTES})
def test_graph_replay_equals_eager_bit_by_bit(batch, kind, route):
    case = make(batch, kind)
    eager = run(case, route)
    static = to_device(case)
    attend(to_device(case), route)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(static, route)
    live = int(case.context.query_start_loc[-1])
    for _ in range(3):
        static.out.fill_(torch.nan)
        static.lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(static.out[:live].cpu(), eager.out[:live])
        assert_same_bits(static.lse[:live].cpu(), eager.lse[:live])


@pytest.mark.parametrize("route", ROUTES)
def test_one_captured_decode_graph_serves_smaller_batches_and_other_memories(route):
    case = make("decode")
    static = to_device(case)
    attend(to_device(case), route)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(static, route)
    for live in (1, 5, 8):
        smaller = replace(case, context=case.context._replace(query_start_loc=case.context.query_start_loc.clone()))
        smaller.context.query_start_loc[live:] = live
        smaller.row_slot = case.row_slot.roll(live)
        static.context.query_start_loc.copy_(smaller.context.query_start_loc)
        static.row_slot.copy_(smaller.row_slot)
        static.out.fill_(torch.nan)
        static.lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        want = run(smaller.fresh(), route)
        for got, wanted in ((static.out, want.out), (static.lse, want.lse)):
            assert_same_bits(got.cpu().nan_to_num(7), wanted.nan_to_num(7))


def test_a_long_segment_is_split_and_merged_by_the_last_program():
    for rows in (1, 3, 64):
        case = make_case(
            [(1, 20)] * rows,
            heads=(8, 2),
            size=128,
            memories=[[]] * rows,
            shared=5000,
            dtype=torch.bfloat16,
            spread=0.5,
        )
        check(case, "shared_batched")
        first, second = run(case, "shared_batched"), run(case, "shared_batched")
        assert_same_bits(first.out, second.out)


@pytest.mark.parametrize("route", ROUTES)
def test_decode_makes_no_host_sync(route):
    case = to_device(make("decode"))
    attend(case, route)
    sync_free: Callable[[str], None] = torch.cuda.set_sync_debug_mode
    sync_free("error")
    try:
        attend(case, route)
    finally:
        sync_free("default")
