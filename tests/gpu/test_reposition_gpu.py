"""The reposition kernel on a real GPU: against fp64, in a CUDA graph, and without a host sync."""

from __future__ import annotations

import pytest
import torch

from mem_triton.ops.reposition import reposition_pages
from tests.ops.reposition_case import RepositionCase, assert_moved, make_case, make_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def run(case: RepositionCase) -> RepositionCase:
    """The case after the op ran on the GPU, back on the CPU."""
    on_gpu = case.clone().to("cuda")
    reposition_pages(on_gpu.pool, on_gpu.positions, on_gpu.rope, **on_gpu.options())
    return on_gpu.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim,rotary_dim", [(32, 32), (80, 80), (96, 24), (128, 128), (256, 256), (64, 0)])
@pytest.mark.parametrize("in_place,move", [(False, False), (True, False), (True, True)])
def test_matches_fp64(dtype, head_dim, rotary_dim, in_place, move):
    rope = make_rope(rotary_dim, factor=1.2, interleaved=move) if rotary_dim else make_rope(0)
    case = make_case(rope, head_dim=head_dim, dtype=dtype, page_size=128, in_place=in_place, move=move, reach=100_000)
    assert_moved(run(case), case)


def test_graph_replay_equals_eager_and_a_negative_page_is_skipped():
    case = make_case(make_rope(128), head_dim=128, dtype=torch.bfloat16)
    eager, static = run(case), case.clone().to("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reposition_pages(static.pool, static.positions, static.rope, **static.options())
    static.pool.copy_(case.pool)
    graph.replay()
    assert torch.equal(static.pool.cpu(), eager.pool)
    static.pool.copy_(case.pool)
    static.page.fill_(-1)
    graph.replay()
    assert torch.equal(static.pool.cpu(), case.pool)


def test_no_host_sync():
    case = make_case(make_rope(128), head_dim=128).to("cuda")
    reposition_pages(case.pool, case.positions, case.rope, **case.options())
    torch.cuda.set_sync_debug_mode("error")
    try:
        reposition_pages(case.pool, case.positions, case.rope, **case.options())
    finally:
        torch.cuda.set_sync_debug_mode("default")
