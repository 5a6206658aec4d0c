"""Training an adapter: official names, gradients through two calls, and what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mem_triton.systems.delta_mem import AdapterError, DeltaMemConfig, load_adapter, save_adapter
from mem_triton_transformers import (
    adapter_from,
    apply_mem_triton,
    get_memory,
    load_memory,
    remove_mem_triton,
    reset_memory,
    save_memory,
    trainable_adapter,
)
from tests.support.models import attention_dims, random_adapter, tiny_model

EVERYTHING = {
    "rank": 4,
    "num_state_heads": 2,
    "couple_lambda": False,
    "trainable_delta_scale": True,
    "delta_scale_granularity": "head",
    "delta_o_rmsnorm": True,
}
TOLD, ASKED = (torch.randint(0, 512, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5))


def two_calls(model: torch.nn.Module) -> Tensor:
    """The first call writes, the second, a new context, reads: the loss sees the first call through the state only."""
    reset_memory(model)
    model(TOLD)
    logits = model(ASKED).logits  # not the model's own loss, which is fp32 in an fp64 model too
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ASKED[:, 1:].flatten())


def test_parameters_have_official_names_and_the_rest_is_frozen() -> None:
    model = tiny_model()
    parameters = trainable_adapter(model, DeltaMemConfig(delta_heads="q,o"))
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == parameters.keys()
    assert all(named[name] is parameter and parameter.dtype == torch.float32 for name, parameter in parameters.items())
    added = named.keys() - dict(tiny_model().named_parameters()).keys()
    assert added == random_adapter(attention_dims(model), delta_heads="q,o").tensors().keys()
    assert {name.split(".")[-1] for name in added - parameters.keys()} == {"delta_k_proj", "delta_v_proj"}


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_gradients_through_two_calls_match_differences(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    parameters = trainable_adapter(model, random_adapter(model, strength=0.1, **EVERYTHING))
    two_calls(model).backward()
    generator, step = torch.Generator().manual_seed(0), 2.0**-11  # norms are fp32, so less is noise
    for name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=generator).sign()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                losses.append(two_calls(model).item())
                parameter.sub_(direction, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-4), name


def test_writes_of_the_first_call_get_gradients_only_through_the_state() -> None:
    model = tiny_model()
    parameters = trainable_adapter(model, random_adapter(model))
    with torch.no_grad():
        reset_memory(model)
        model(TOLD)
    assert all(not state.requires_grad for state in get_memory(model).values())
    model(ASKED[:, :1], labels=ASKED[:, :1])
    reset_memory(model)
    model(TOLD)
    last = get_memory(model)["model.layers.1.self_attn"]
    assert last.requires_grad
    model(ASKED).logits[:, 0].sum().backward()  # the first token reads nothing but the first call's state
    assert parameters["model.layers.1.self_attn.memory_v_proj"].grad.abs().max() > 0


def test_training_lowers_the_loss_and_the_adapter_comes_out(tmp_path: Path) -> None:
    model = tiny_model()
    plain = model(ASKED).logits
    parameters = trainable_adapter(model, DeltaMemConfig(rank=4, output_init="random", online_gain=0.5), seed=3)
    optimizer, losses = torch.optim.Adam(parameters.values(), lr=2e-2), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = two_calls(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        trained = two_calls(model)
        save_memory(model, tmp_path / "memory.safetensors")
    save_adapter(adapter_from(model), tmp_path / "adapter")
    remove_mem_triton(model)
    assert torch.equal(model(ASKED).logits, plain)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    apply_mem_triton(model, {"delta": {"adapter": str(tmp_path / "adapter")}})
    with torch.no_grad():
        assert two_calls(model).item() == pytest.approx(trained.item(), abs=1e-6)
        load_memory(model, tmp_path / "memory.safetensors")  # the fingerprint of the adapter in training


def test_seed_and_initialisation() -> None:
    def fresh(seed: int = 0, **config: object) -> dict[str, Tensor]:
        model = tiny_model()
        trainable_adapter(model, DeltaMemConfig(**config), seed=seed)
        return adapter_from(model).tensors()

    name = "model.layers.0.self_attn."
    a, b, c = fresh(), fresh(), fresh(seed=1)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a[name + "memory_q_proj"], c[name + "memory_q_proj"])
    assert a[name + "memory_q_proj"].abs().max() <= 64**-0.5
    assert a[name + "delta_q_proj"].abs().max() == 0 and torch.all(a[name + "beta_bias"] == -1.5)
    sliced = fresh(rank=4, base_slice_ref_width=3, output_init="base_slice_fixed", delta_heads="o")
    assert sliced[name + "delta_o_proj"].norm(dim=0).tolist() == pytest.approx([0.05, 0.05, 0.05, 0.0])
    column = tiny_model().model.layers[0].self_attn.o_proj.weight[:, 0]
    assert torch.allclose(sliced[name + "delta_o_proj"][:, 0], 0.05 * column / column.norm())
    assert sliced[name + "delta_q_proj"].abs().max() == 0
    scaled = fresh(trainable_delta_scale=True, delta_scale_init=0.5, couple_lambda=False)
    assert (scaled[name + "delta_scale_raw"].sigmoid() * 2).item() == pytest.approx(0.5)
    assert torch.all(scaled[name + "lambda_bias"] == 1.5)


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    model, adapter = tiny_model(), random_adapter(tiny_model(), dtype=torch.bfloat16)
    save_adapter(adapter, tmp_path)
    trainable_adapter(model, load_adapter(tmp_path))
    for name, tensor in adapter_from(model).tensors().items():
        assert torch.equal(tensor, adapter.tensors()[name].float())
    with pytest.raises(AdapterError, match=r"has shape"):
        trainable_adapter(tiny_model(head_dim=16), adapter)
    with pytest.raises(ValueError, match="target_layers"):
        trainable_adapter(tiny_model(), DeltaMemConfig(target_layers=(7,)))


def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_model().train()
    parameters = trainable_adapter(model, random_adapter(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(ASKED, labels=ASKED, use_cache=False).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        loss.backward()
    model.gradient_checkpointing_disable()
    two_calls(model).backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
