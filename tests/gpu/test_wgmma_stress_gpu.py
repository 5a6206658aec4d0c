"""Steps in blocks of 64 rows, which Hopper multiplies asynchronously, over and over: the same bits, and right ones.

Triton 3.6 puts no fence between the copies that fill shared memory and the product that reads it
(https://github.com/triton-lang/triton/issues/9610); a product that came too early would be wrong now and then.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mem_triton.ops.memory_attention import FOREVER
from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
from mem_triton.ops.memory_attention.fused import launch
from mem_triton.ops.tuning.memory_attention import select_pages, select_shared
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig, select
from tests.ops.attention_case import AttentionCase, assert_matches, expected, make_case, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
REPEATS = 1000


def prefill() -> AttentionCase:
    return make_case(
        [(200, 900), (1, 4000), (64, 0)],
        memories=[[(8, 0, FOREVER)] * 40, [(8, 0, FOREVER)] * 5, None],
        heads=(8, 2),
        size=128,
        shared=700,
        shared_range=[(0, FOREVER)] * 3,
        dtype=torch.bfloat16,
        spread=0.5,
    )


def attend(case: AttentionCase, kernel: str, config: FusedConfig) -> None:
    """One launch on a case that lies on a GPU; the shared segment and the pages are merged into zeros."""
    if kernel == "fused":
        launch.attend(case.call(), config=config)
        return
    case.out.zero_()
    case.lse.fill_(-torch.inf)
    call = case.memory_call(case.out, case.lse)
    if kernel == "shared":
        cascade_launch.attend_shared(call, config)
    else:
        cascade_launch.attend_pages(call, True, config)


@pytest.mark.parametrize("kernel,choose", [("fused", select), ("shared", select_shared), ("pages", select_pages)])
def test_a_thousand_repeats_have_the_same_bits_and_those_of_small_blocks_are_close(kernel, choose):
    case = to_device(prefill())
    config = choose(launch.architecture(case.query.device), 128, 2, 800)
    assert config.block_m >= 64
    attend(case, kernel, config)
    first, first_lse = case.out.clone(), case.lse.clone()
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        attend(case, kernel, config)
        same = (case.out.view(torch.int16) == first.view(torch.int16)).all() & (case.lse == first_lse).all()
        differ += (~same).long()
    assert int(differ) == 0, f"{int(differ)} of {REPEATS} repeats differ"
    attend(case, kernel, replace(config, block_m=32))  # mma.sync, which waits for nobody
    assert (case.out.float() - first.float()).abs().max() <= 2**-6 * first.float().abs().max()
    if kernel == "fused":
        assert_matches(to_device(replace(case, out=first, lse=first_lse), "cpu"), expected(prefill()))
