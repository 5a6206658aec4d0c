"""The delta rule's kernels on a real GPU: against fp64, in CUDA graphs, and bit-stable."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mem_triton.ops.delta_rule import DeltaRuleSpec, activate, delta_rule, delta_rule_paged
from tests.ops.paged_case import PagedCase, assert_matches, expected, make_case, relative_rms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BATCHES = {  # new tokens, tokens before
    "decode": ([1] * 9, list(range(9))),
    "short": ([3, 0, 17, 1], [0, 4, 9, 30]),
    "long": ([700, 1, 0, 300], [5, 40, 3, 0]),
}


def run(case: PagedCase) -> PagedCase:
    """The case after the op ran on the GPU, back on the CPU."""
    on_gpu = case.clone().to("cuda")
    delta_rule_paged(*on_gpu.arguments(), **on_gpu.options())
    torch.cuda.synchronize()
    return on_gpu.to("cpu")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank,heads", [(4, 1), (8, 1), (8, 3), (8, 4), (8, 8), (16, 2), (32, 1), (32, 4)])
def test_matches_fp64(batch, dtype, rank, heads):
    queries, computed = BATCHES[batch]
    slots, writes = [-1, 0, 1, 2, 3][: len(queries)], [1, 0, 1, 1, 1][: len(queries)]
    if len(queries) > 5:
        slots, writes = None, None
    spec = DeltaRuleSpec(rank, heads)
    case = make_case(spec, queries, computed, slots=slots, writes=writes, dtype=dtype, padding_tokens=2)
    assert_matches(run(case), case, expected(case), tolerance=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("couple,rankwise,normalize", list(itertools.product([True, False], repeat=3)))
def test_every_gate_semantics(batch, mode, couple, rankwise, normalize):
    spec = DeltaRuleSpec(8, 2, rankwise, couple, mode, normalize)
    case = make_case(spec, *BATCHES[batch], scale=1.0 if normalize else 0.3)
    assert_matches(run(case), case, expected(case), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8192_tokens_stay_within_1e_5_of_fp64(dtype):
    spec, tokens = DeltaRuleSpec(8, 1), 8192
    case = make_case(spec, [tokens], [0], block_size=16, tokens_per_state=16, dtype=dtype)
    case.gate_bias.fill_(-3.0)
    after = run(case)
    reads, _, states = delta_rule(activate(case.projections.double(), case.gate_bias.double(), spec), snapshot_every=16)
    assert relative_rms(after.reads[:tokens], reads.flatten(1)) <= 1e-5
    assert relative_rms(after.state_cache[case.block_table[0].long(), 0], states[0].flatten(1)) <= 1e-5


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_equals_eager_bit_by_bit(batch, dtype):
    case = make_case(DeltaRuleSpec(8, 4), *BATCHES[batch], dtype=dtype)
    eager = run(case)
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


def test_one_captured_decode_graph_serves_smaller_batches():
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


def test_runs_are_bit_equal_and_do_not_depend_on_neighbours():
    case = make_case(DeltaRuleSpec(8, 2), [700, 1, 300], [5, 40, 0])
    first, second = run(case), run(case)
    assert torch.equal(first.reads[:1001], second.reads[:1001]) and torch.equal(first.state_cache, second.state_cache)
    alone = replace(
        case,
        projections=case.projections[701:],
        reads=case.reads[701:],
        block_table=case.block_table[2:],
        query_start_loc=torch.tensor([0, 300], dtype=torch.int32),
        seq_lens=case.seq_lens[2:],
    )
    assert torch.equal(run(alone).reads[:300], first.reads[701:1001])


def test_decode_makes_no_host_sync():
    case = make_case(DeltaRuleSpec(8, 1), [1] * 4, [9] * 4).to("cuda")
    delta_rule_paged(*case.arguments(), **case.options())
    torch.cuda.set_sync_debug_mode("error")
    try:
        delta_rule_paged(*case.arguments(), **case.options())
    finally:
        torch.cuda.set_sync_debug_mode("default")
