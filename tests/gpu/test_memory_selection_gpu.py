"""The selection kernel on a real GPU: against fp64, bit-stable, and without a host sync."""

from __future__ import annotations

import pytest
import torch

from mem_triton.ops.memory_selection import select_tokens, selection_weights
from mem_triton.ops.memory_selection.reference import MODES
from tests.ops.selection_case import SelectionCase, assert_picks, assert_weights, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on_gpu(case: SelectionCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return case.q.cuda(), case.k.cuda(), case.flags.cuda()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37, 128, 512, 700])  # the last one by torch
@pytest.mark.parametrize("heads,head_dim", [((40, 8), 80), ((32, 8), 128), ((6, 2), 32)])
def test_matches_fp64(mode, dtype, tokens, heads, head_dim):
    case = make_case([tokens, tokens // 2], heads=heads, head_dim=head_dim, dtype=dtype, mode=mode)
    q, k, valid = on_gpu(case)
    assert_weights(selection_weights(q, k, valid, mode=mode).cpu(), case)
    indices, count = select_tokens(q, k, valid=valid, mode=mode)
    assert_picks(indices.cpu(), count.cpu(), case, 8)


def test_equal_tokens_weigh_the_same_and_runs_are_bit_equal():
    g = torch.Generator().manual_seed(0)
    words, text = torch.randn(6, 3, 64, generator=g), torch.randint(6, (128,), generator=g)
    q, k = words[text][None, :, :2].cuda(), words[text][None, :, 2:].cuda()
    weights = selection_weights(q, k)
    assert all(len(weights[0, 0].cpu()[text == word].unique()) == 1 for word in range(6))
    assert torch.equal(selection_weights(q, k), weights)


def test_no_host_sync():
    q, k, valid = on_gpu(make_case([128, 90]))
    select_tokens(q, k, valid=valid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_tokens(q, k, valid=valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
