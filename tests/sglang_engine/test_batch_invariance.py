"""The batch-invariant mode on SGLang: its own option accepts our backend, and no row changes its way for another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mem_triton.ops.memory_attention import Policy
from mem_triton_sglang import BACKEND, register
from mem_triton_sglang.backend import BackendWithMemory


def test_deterministic_inference_takes_our_backend():
    from sglang.srt.server_args import DETERMINISTIC_ATTENTION_BACKEND_CHOICES

    register()
    assert BACKEND in DETERMINISTIC_ATTENTION_BACKEND_CHOICES


@pytest.mark.parametrize(
    ("reads_bank", "policy", "stock"),
    [(False, None, True), (True, None, False), (False, Policy(batch_invariant=True), False)],
)
def test_whose_step_it_is(reads_bank, policy, stock):
    """Otherwise a row without memory would be stock's or ours, as its neighbours have none or some."""
    memory = SimpleNamespace(reading=[True] if reads_bank else (), policy=policy, has_segments=True)
    backend = SimpleNamespace(mem_triton=memory, mem_step=SimpleNamespace(captured=False), _alone=policy is not None)
    assert BackendWithMemory._is_stock_step.fget(backend) is stock
