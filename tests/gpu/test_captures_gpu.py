"""Prompts that are kept, on a GPU: their copies are queued behind steps that have not run yet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.ops.reposition import rope_from_config
from mem_triton.systems.explicit import worker_captures as module
from mem_triton.systems.explicit.worker_captures import WorkerCaptures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TOKENS, DIM = 512, 64
LONG = 200_000_000
"""Cycles that the GPU is busy with a step: about a tenth of a second."""


def captured_behind_a_long_step(folder: Path) -> torch.Tensor:
    """The values that were kept; the step that computes them, all ones, runs long after the request has left."""
    cache = torch.zeros(2, TOKENS, DIM, device="cuda")
    rope = rope_from_config({"model_type": "qwen3", "head_dim": DIM, "rope_theta": 10_000.0})
    captures = WorkerCaptures({0: rope}, 0, 0, lambda *_: (cache.clone(), cache.clone()))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # as engines have one of their own
        torch.cuda._sleep(LONG)
        cache.fill_(1)
        captures.enter("r", {"capture": {"lease": "l", "folder": str(folder), "tokens": TOKENS}})
        captures.set_rows(["r"], [TOKENS - 1])
        captures.leave("r")
        torch.cuda._sleep(LONG)
        cache.fill_(2)  # somebody else's step
    until = time.monotonic() + 20
    while not (state := captures.state("l")):
        assert time.monotonic() < until
    return load_file(state["file"])["0.values"]


def test_the_file_holds_what_the_queued_step_computes(tmp_path):
    assert bool((captured_behind_a_long_step(tmp_path) == 1).all())


def test_control_without_the_mark_the_copy_is_read_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_mark", lambda copies: None)
    assert not bool((captured_behind_a_long_step(tmp_path) == 1).all())
