"""The kernel between projection and attention on a real GPU: against fp64, in CUDA graphs, and bit-stable."""

from __future__ import annotations

import pytest
import torch

from mem_triton.ops.attention_inputs import attention_inputs
from mem_triton.ops.delta_rule import DeltaRuleSpec
from tests.ops.inputs_case import InputsCase, assert_inputs_match, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BATCHES = {  # new tokens, tokens before
    "decode": ([1] * 300, [n % 40 for n in range(300)]),
    "mixed": ([3, 0, 17, 1], [0, 4, 9, 30]),
    "long": ([700, 1, 0, 300], [5, 40, 3, 0]),
}


def call(case: InputsCase) -> None:
    states = case.states
    attention_inputs(
        case.projected[:, : case.inputs.width],
        case.projections,
        states.reads,
        case.inputs,
        case.batch(),
        states.spec,
        block_size=states.block_size,
        tokens_per_state=states.tokens_per_state,
        max_query_len=states.max_query_len,
        rounded=case.rounded,
    )


def run(case: InputsCase) -> InputsCase:
    """The case after the op ran on the GPU, back on the CPU."""
    on_gpu = case.clone().to("cuda")
    call(on_gpu)
    torch.cuda.synchronize()
    return on_gpu.to("cpu")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads,corrects,norms,rotated",
    [
        ((32, 8, 128), "q", True, 128),
        ((32, 8, 128), "qkv", False, 128),
        ((40, 8, 80), "qv", False, 80),
        ((14, 2, 64), "k", True, 32),
        ((4, 4, 96), "v", False, 0),
    ],
)
def test_matches_fp64(batch, dtype, heads, corrects, norms, rotated):
    case = make_inputs(
        DeltaRuleSpec(8, 1),
        *BATCHES[batch],
        heads=heads,
        corrects=corrects,
        norms=norms,
        rotated=rotated,
        dtype=dtype,
        interleaved=rotated == 32,
        padding_tokens=2,
    )
    assert_inputs_match(run(case), case, tolerance=1e-5)


@pytest.mark.parametrize("rank,heads", [(4, 1), (8, 4), (16, 2), (32, 1), (16, 4), (32, 4)])
def test_every_state(rank, heads):
    case = make_inputs(DeltaRuleSpec(rank, heads), *BATCHES["decode"], heads=(8, 2, 128), rotated=128, corrects="qv")
    assert_inputs_match(run(case), case, tolerance=1e-5)


def test_replays_equal_eager_bit_by_bit():
    """Three decode steps of one graph: the counters are as they were, whichever program comes last."""
    case = make_inputs(DeltaRuleSpec(8, 1), *BATCHES["decode"], heads=(32, 8, 128), rotated=128, dtype=torch.bfloat16)
    eager, captured, warm = (case.clone().to("cuda") for _ in range(3))
    call(warm)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(captured)
    for _ in range(3):
        call(eager)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.projected, eager.projected) and torch.equal(captured.states.reads, eager.states.reads)
    assert torch.equal(captured.states.state_cache, eager.states.state_cache)
