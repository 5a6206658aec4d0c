"""Memory on disk: states come back bit for bit, and a file of another adapter or model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from mem_triton_transformers import apply_mem_triton, get_memory, load_memory, reset_memory, save_memory, set_memory
from tests.support.models import random_adapter, tiny_model

IDS = torch.arange(24).view(2, 12) * 7


def with_memory(family: str = "qwen3", seed: int = 1, **config: object) -> torch.nn.Module:
    model = tiny_model(family)
    return apply_mem_triton(model, {"delta": {"adapter": random_adapter(model, seed=seed, **config)}})


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("config", [{}, {"num_state_heads": 2, "rank": 4}], ids=["tsw", "msw"])
def test_a8_saved_memory_continues_bit_for_bit(tmp_path: Path, suffix: str, config: dict) -> None:
    model, path = with_memory(**config), tmp_path / f"memory.{suffix}"
    model(IDS)
    save_memory(model, path)
    expected, states = model(IDS).logits, get_memory(model)
    for fresh in (model, with_memory(**config)):
        reset_memory(fresh)
        load_memory(fresh, path)
        assert torch.equal(fresh(IDS).logits, expected)
        assert all(torch.equal(state, states[name]) for name, state in get_memory(fresh).items())
    assert not list(tmp_path.glob("*.partial"))


def test_official_format_is_three_dimensional_for_one_head(tmp_path: Path) -> None:
    for heads, shape in ((1, (2, 8, 8)), (2, (2, 2, 8, 8))):
        model = with_memory(num_state_heads=heads)
        model(IDS)
        save_memory(model, tmp_path / "delta_state.pt")
        data = torch.load(tmp_path / "delta_state.pt", weights_only=True)
        assert list(data) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert {tuple(state.shape) for state in data.values()} == {shape}


def test_official_states_in_bfloat16_and_with_layers_left_out(tmp_path: Path) -> None:
    model = with_memory()
    model(IDS)
    state = torch.randn(1, 8, 8, dtype=torch.bfloat16)
    torch.save({"model.layers.1.self_attn": state}, tmp_path / "delta_state.pt")
    load_memory(model, tmp_path / "delta_state.pt")
    assert torch.equal(get_memory(model)["model.layers.1.self_attn"], state.float().unsqueeze(1))
    assert "model.layers.0.self_attn" not in get_memory(model)  # as in the official code: still empty
    model(IDS[:1])
    assert len(get_memory(model)) == 2


def test_file_of_another_adapter_or_model_is_refused(tmp_path: Path) -> None:
    model, path = with_memory(), tmp_path / "memory.safetensors"
    model(IDS)
    save_memory(model, path)
    with pytest.raises(ValueError, match=r"memory\.safetensors: adapter is '[0-9a-f]{64}', but this model needs"):
        load_memory(with_memory(seed=2), path)
    llama = tiny_model("llama")
    apply_mem_triton(llama, {"delta": {"adapter": random_adapter(tiny_model("qwen3"))}})
    with pytest.raises(ValueError, match="model_type is 'qwen3', but this model needs 'llama'"):
        load_memory(llama, path)


def test_damaged_and_foreign_files_change_nothing(tmp_path: Path) -> None:
    model, path = with_memory(), tmp_path / "memory.safetensors"
    model(IDS)
    save_memory(model, path)
    before = get_memory(model)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    states = {name: state.clone() for name, state in before.items()}
    for tensors, meta, message in (
        (states, None, "format is None"),
        (states, metadata | {"format": "v0"}, "format is 'v0'"),
        (states | {"model.layers.0.self_attn": torch.zeros(2, 1, 4, 4)}, metadata, "shapes differ"),
        (states | {"model.layers.9.self_attn": torch.zeros(2, 1, 8, 8)}, metadata, "shapes differ"),
    ):
        safetensors.torch.save_file(tensors, path, metadata=meta)
        with pytest.raises(ValueError, match=message):
            load_memory(model, path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_memory(model, path)
    official = tmp_path / "delta_state.pt"
    for content, message in (
        ({"model.layers.9.self_attn": torch.zeros(2, 8, 8)}, r"state model\.layers\.9\.self_attn is of no layer"),
        ({"model.layers.0.self_attn": torch.zeros(2, 4, 4)}, r"layers\.0\.self_attn has shape \(2, 1, 4, 4\)"),
        ([torch.zeros(2, 8, 8)], "must hold a dict"),
    ):
        torch.save(content, official)
        with pytest.raises(ValueError, match=message):
            load_memory(model, official)
    assert all(torch.equal(state, before[name]) for name, state in get_memory(model).items())


def test_states_of_different_batch_sizes_are_refused() -> None:
    model = with_memory()
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    with pytest.raises(ValueError, match=r"differ in batch size: \[1, 2\]"):
        set_memory(model, {name: torch.zeros(i + 1, 1, 8, 8) for i, name in enumerate(names)})


def test_empty_memory_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory is empty"):
        save_memory(with_memory(), tmp_path / "memory.safetensors")
    assert not list(tmp_path.iterdir())
