"""Train a δ-mem adapter with transformers: its tensors as parameters of the model, under their official names.

Example::

    parameters = trainable_adapter(model, DeltaMemConfig(delta_heads=("q", "o"), output_init="random"))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for facts, question in data:
        reset_memory(model)
        model(**facts)                            # writes; keeps the graph
        model(**question).loss.backward()         # reads; gradients reach the writes of the first call
        optimizer.step(), optimizer.zero_grad()
    save_adapter(adapter_from(model), "adapter")
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem_triton.systems.delta_mem import (
    AttentionDims,
    DeltaMemAdapter,
    DeltaMemConfig,
    DeltaMemLayerWeights,
    adapter_from_tensors,
    pack_layer,
    tensor_shapes,
)
from mem_triton_transformers.attach import (
    ModelMemory,
    attach,
    attention_dims,
    attention_modules,
    memory_of,
)


def trainable_adapter(
    model: PreTrainedModel, config: DeltaMemConfig | DeltaMemAdapter, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Give ``model`` a δ-mem memory whose adapter trains, and freeze the model's own parameters.

    config: of a fresh adapter, initialised as the official code does from ``seed``; or an adapter to train further.
    The parameters are fp32 members of the attention modules, so ``model.named_parameters()`` gives them their official
    names, ``model.layers.0.self_attn.memory_q_proj``. States are not detached between calls while gradients are on.
    Returns name -> parameter for the optimizer; the tensors of inactive heads are not among them.
    ``remove_mem_triton`` takes the parameters off and restores every requires_grad.
    Raises ValueError if the model has memory already, AdapterError if an adapter does not fit.
    """
    settings = config.config if isinstance(config, DeltaMemAdapter) else config
    modules = {name: m for name, m in attention_modules(model, settings).items() if settings.targets(name)}
    if not modules:
        raise ValueError(f"target_layers={settings.target_layers} selects no layer of this model")
    if isinstance(config, DeltaMemAdapter):
        config.layers_for(attention_dims(model, settings))  # checks only
    trained_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    dims = attention_dims(model, settings)
    initial = {}
    for name, module in modules.items():
        shapes = tensor_shapes(settings, dims[name])
        initial[name] = (
            config.layers[name]
            if isinstance(config, DeltaMemAdapter)
            else {key: _initial(key, shape, settings, module, generator) for key, shape in shapes.items()}
        )
    memory = ModelMemory(settings, adapter=partial(_extract, settings, modules))
    attach(model, memory, {name: partial(_pack, settings, module) for name, module in modules.items()}, trainable=True)
    for parameter in trained_before:
        parameter.requires_grad_(False)
    memory.undo.append(partial(_restore_requires_grad, trained_before))
    for name, module in modules.items():
        device = module.q_proj.weight.device
        for key, value in initial[name].items():
            active = _is_active(key, settings)
            parameter = nn.Parameter(value.detach().to(device, torch.float32, copy=True), requires_grad=active)
            module.register_parameter(key, parameter)
            memory.undo.append(partial(delattr, module, key))
            if active:
                parameters[f"{name}.{key}"] = parameter
    return parameters


def adapter_from(model: PreTrainedModel) -> DeltaMemAdapter:
    """Return the model's adapter as it is now, detached, e.g. to save it in the course of training."""
    return memory_of(model).adapter()


def _layer_tensors(config: DeltaMemConfig, module: nn.Module) -> dict[str, Tensor]:
    return {key: getattr(module, key) for key in tensor_shapes(config, AttentionDims(1, 1, 1, 1, 1))}


def _pack(config: DeltaMemConfig, module: nn.Module) -> DeltaMemLayerWeights:
    return pack_layer(config, _layer_tensors(config, module))


def _extract(config: DeltaMemConfig, modules: dict[str, nn.Module]) -> DeltaMemAdapter:
    flat = {
        f"{name}.{key}": tensor.detach().cpu().clone()
        for name, module in modules.items()
        for key, tensor in _layer_tensors(config, module).items()
    }
    return adapter_from_tensors(config, flat)


def _restore_requires_grad(before: dict[nn.Parameter, bool]) -> None:
    for parameter, required in before.items():
        parameter.requires_grad_(required)


def _is_active(key: str, config: DeltaMemConfig) -> bool:
    if key == "delta_scale_raw":
        return True
    if key == "delta_o_rmsnorm_weight":
        return "o" in config.delta_heads
    return not key.startswith("delta_") or key.split("_")[1] in config.delta_heads


def _initial(
    key: str, shape: tuple[int, ...], config: DeltaMemConfig, module: nn.Module, generator: torch.Generator
) -> Tensor:
    """A fresh tensor, distributed as the official code's (the random stream differs)."""
    if key in ("beta_bias", "lambda_bias"):
        return torch.full(shape, config.beta_bias_init if key == "beta_bias" else -config.beta_bias_init)
    if key == "delta_scale_raw":
        return torch.full(shape, config.initial_scale_raw)
    if key == "delta_o_rmsnorm_weight":
        return torch.ones(shape)
    if key.startswith("memory_"):
        return _kaiming_uniform(shape, generator)
    if key in ("beta_proj", "lambda_proj") or not _is_active(key, config) or config.output_init == "zero":
        return torch.zeros(shape)
    if config.output_init == "random":
        return config.online_gain * _kaiming_uniform(shape, generator)
    # base_slice: the first columns of the frozen projection, each of unit length, times the gain
    weight = getattr(module, key.removeprefix("delta_")).weight.detach().float().cpu()
    width = min(config.rank, weight.shape[1])
    if config.output_init == "base_slice_fixed":
        width = min(width, config.base_slice_ref_width)
    delta = torch.zeros(shape)
    delta[:, :width] = config.online_gain * F.normalize(weight[:, :width], dim=0, eps=1e-6)
    return delta


def _kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
