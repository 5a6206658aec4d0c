"""Prompts that are kept: copied when their request leaves, written without their rotation, answered for by lease."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config, rotate
from mem_triton.systems.explicit import worker_captures as module
from mem_triton.systems.explicit.worker_captures import WorkerCaptures
from mem_triton.systems.payload import CaptureOrder

HEADS, TOKENS, DIM, LAYERS = 2, 5, 8, (1, 3)
ROPE = rope_from_config({"model_type": "qwen3", "head_dim": DIM, "rope_theta": 10_000.0})


def context(request_id: str, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys without rotation, and values, of a request's first tokens; no two requests or layers are alike."""
    generator = torch.Generator().manual_seed(sum(map(ord, request_id)) * 100 + layer)
    both = torch.randn(2, HEADS, 64, DIM, generator=generator)[:, :, :tokens]
    return both[0], both[1]


def rotated(request_id: str, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = context(request_id, layer, tokens)
    return rotate(keys, torch.arange(tokens), ROPE), values


def make(read=rotated) -> WorkerCaptures:
    ropes: dict[int, RotaryEmbedding] = dict.fromkeys(LAYERS, ROPE)
    return WorkerCaptures(ropes, first_head=4, rank=1, read_context=read)


def carried(folder: Path, lease: str, tokens: int = TOKENS) -> CaptureOrder:
    return CaptureOrder(lease, str(folder), tokens)


def answer(captures: WorkerCaptures, lease: str) -> dict:
    return captures.outcome(lease).result(20)


def test_a_prompt_is_copied_when_its_request_leaves(tmp_path):
    captures = make()
    captures.enter("r", carried(tmp_path / "new", "lease"))
    captures.enter("plain", None)
    captures.set_rows(["plain", "r"], [9, TOKENS - 1])
    captures.leave("plain")
    captures.leave("r")
    file = answer(captures, "lease")["file"]
    assert Path(file).name == "lease.1.safetensors"
    with safe_open(file, framework="pt") as f:
        assert f.metadata() == {"first_head": "4"}
        for layer in LAYERS:
            keys, values = context("r", layer, TOKENS)
            torch.testing.assert_close(f.get_tensor(f"{layer}.keys"), keys)
            assert torch.equal(f.get_tensor(f"{layer}.values"), values)


def test_the_front_end_may_ask_first(tmp_path):
    captures = make()
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS + 3])
    asked = captures.outcome("lease")
    assert not asked.done() and not list(tmp_path.iterdir()), "it is copied when it leaves, between two steps"
    captures.leave("r")
    assert "file" in asked.result(20) and len(list(tmp_path.iterdir())) == 1 and not captures._asked


@pytest.mark.parametrize("end", ["dropped", "lost its memory"])
def test_who_asked_for_what_never_comes_hears_so(tmp_path, end):
    captures = make()
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    asked = captures.outcome("lease")
    captures.drop(["lease"]) if end == "dropped" else captures.drop_request("r")
    assert "lease" in asked.result(0)["error"] and not captures._asked


def test_a_request_that_was_taken_back_too_early_is_kept_when_it_comes_again(tmp_path):
    captures = make()
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 2])
    captures.leave("r")
    assert "no prompt is held for lease" in answer(captures, "lease")["error"]
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    captures.leave("r")
    assert "file" in answer(captures, "lease")


def test_an_answer_waits_until_the_file_is_written(tmp_path, monkeypatch):
    go, stock = threading.Event(), module.save_file

    def slow(*arguments, **options) -> None:
        assert go.wait(20)
        stock(*arguments, **options)

    monkeypatch.setattr(module, "save_file", slow)
    captures = make()
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    captures.leave("r")
    asked = captures.outcome("lease")
    assert not asked.done()
    go.set()
    assert "file" in asked.result(20) and "file" in answer(captures, "lease")


def test_what_cannot_be_written_is_an_error_by_name(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    captures = make()
    captures.enter("r", carried(tmp_path / "taken", "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    captures.leave("r")
    assert "taken" in answer(captures, "lease")["error"]


def test_a_device_without_room_for_the_copy_is_an_error_and_the_engine_goes_on(tmp_path):
    def full(*_) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.OutOfMemoryError("no room")

    captures = make(full)
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    captures.leave("r")
    assert answer(captures, "lease") == {"error": "no room"}


def test_old_answers_are_forgotten_beyond_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_ANSWERS", 2)
    captures = make()
    for i in range(3):
        captures.enter(f"r{i}", carried(tmp_path, f"lease{i}"))
        captures.set_rows([f"r{i}"], [TOKENS - 1])
        captures.leave(f"r{i}")
    assert "lease0" in answer(captures, "lease0")["error"]
    assert "file" in answer(captures, "lease1") and "file" in answer(captures, "lease2")


def test_fault17_a_file_that_does_not_fit_on_the_disk_does_not_stay_half_written(tmp_path, monkeypatch):
    def full(tensors, file, **_) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    captures = make()
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    captures.leave("r")
    assert "No space left" in answer(captures, "lease")["error"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before it comes", "while it runs", "once it is written"])
def test_fault18_a_capture_that_nobody_asks_for_leaves_nothing(tmp_path, when):
    captures = make()
    if when == "before it comes":
        captures.drop(["lease"])
    captures.enter("r", carried(tmp_path, "lease"))
    captures.set_rows(["r"], [TOKENS - 1])
    if when == "while it runs":
        captures.drop(["lease"])
    captures.leave("r")
    if when == "once it is written":
        captures.drop(["lease"])
    captures._writer.submit(int).result(20)  # behind what was being written
    assert not list(tmp_path.iterdir()) and not captures._requests and not captures._files
    captures.enter("next", carried(tmp_path, "other"))
    captures.set_rows(["next"], [TOKENS - 1])
    captures.leave("next")
    assert "file" in answer(captures, "other")
