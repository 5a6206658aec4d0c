"""Put memory on a transformers model, and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mem_triton.compat import require
from mem_triton.config import ConfigError, parse_config
from mem_triton.systems.delta_mem import (
    AttentionDims,
    DeltaMemAdapter,
    DeltaMemConfig,
    DeltaMemLayerWeights,
    load_adapter,
)
from mem_triton_transformers.call import ModelCall
from mem_triton_transformers.layer import DeltaLayer
from mem_triton_transformers.modes import BATCHING, check_generate, refuse_batching

ATTRIBUTE = "_mem_triton"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class ModelMemory:
    """All that mem_triton keeps about one model; lies on the model as a plain attribute."""

    config: DeltaMemConfig
    adapter: Callable[[], DeltaMemAdapter]
    call: ModelCall = field(default_factory=ModelCall)
    layers: dict[str, DeltaLayer] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)


def apply_mem_triton(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """Give ``model`` a δ-mem memory (arXiv 2605.12357, section 3), in place; returns the model.

    config: ``{"delta": {"adapter": folder, Hugging Face id or DeltaMemAdapter, "revision": optional}}``.
    The memory starts empty, and lives until ``reset_memory``: it outlasts generate() calls and KV caches. Tokens are
    valid by the 2-D attention mask that the caller passes; padding may lie on either side. A row is one sequence:
    several sequences packed into a row would share a state.
    Raises ConfigError for the config, AdapterError if the adapter does not fit the model, ValueError if the model has
    memory already, UnsupportedVersionError for an untested transformers.

    Example::

        apply_mem_triton(model, {"delta": {"adapter": "declare-lab/delta-mem_qwen3_4b-instruct"}})
    """
    adapter = _adapter(config)
    weights = adapter.layers_for(attention_dims(model, adapter.config))
    memory = ModelMemory(adapter.config, adapter=lambda: adapter)
    attach(model, memory, {name: partial(_same, packed) for name, packed in weights.items()})
    return model


def remove_mem_triton(model: PreTrainedModel) -> PreTrainedModel:
    """Take memory off again; the model is then bit for bit the stock one. Raises ValueError if it has none."""
    memory = memory_of(model)
    for handle in memory.handles:
        handle.remove()
    for undo in memory.undo:
        undo()
    delattr(model, ATTRIBUTE)
    return model


def memory_of(model: nn.Module) -> ModelMemory:
    """The model's memory; raises ValueError if it has none."""
    memory = getattr(model, ATTRIBUTE, None)
    if memory is None:
        raise ValueError("this model has no memory: call apply_mem_triton(model, ...) or trainable_adapter first")
    return memory


def attention_modules(model: nn.Module, config: DeltaMemConfig) -> dict[str, nn.Module]:
    """Adapter name -> attention module, for every module that has the four projections.

    Raises ValueError if there is none, as in models that fuse q, k and v into one projection.
    """
    prefix = ""
    if getattr(model, "base_model", None) is model and getattr(model, "base_model_prefix", ""):
        prefix = model.base_model_prefix + "."  # a bare decoder: adapters name modules as the full model does
    found = {
        prefix + name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.target_modules
        and all(isinstance(getattr(module, projection, None), nn.Module) for projection in PROJECTIONS)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(config.target_modules)} with {', '.join(PROJECTIONS)}; "
            "models with one fused projection are not supported"
        )
    return found


def attention_dims(model: nn.Module, config: DeltaMemConfig | None = None) -> dict[str, AttentionDims]:
    """Adapter name -> widths of every attention module of a model."""
    modules = attention_modules(model, config or DeltaMemConfig())
    return {
        name: AttentionDims(module.q_proj.in_features, *(getattr(module, p).out_features for p in PROJECTIONS))
        for name, module in modules.items()
    }


def attach(
    model: PreTrainedModel,
    memory: ModelMemory,
    packed: Mapping[str, Callable[[], DeltaMemLayerWeights]],
    trainable: bool = False,
) -> None:
    """Register all hooks for the layers in ``packed`` and put ``memory`` on the model."""
    require("transformers")
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ValueError("this model has memory already: call remove_mem_triton(model) first")
    modules = attention_modules(model, memory.config)
    for name, weights in packed.items():
        layer = DeltaLayer(name, memory.config, weights, memory.call, trainable)
        memory.layers[name] = memory.call.layers[name] = layer
        memory.handles += layer.attach(modules[name])
    chosen = {id(modules[name]) for name in packed}
    for module in model.modules():  # the model, and a decoder inside it that may be called by itself
        if isinstance(module, PreTrainedModel) and any(id(child) in chosen for child in module.modules()):
            memory.handles += memory.call.attach(module)
    if hasattr(model, "generate"):
        model.generate = partial(_generate, model)
        memory.undo.append(partial(delattr, model, "generate"))
    for name in BATCHING:
        if hasattr(model, name):
            setattr(model, name, partial(refuse_batching, name))
            memory.undo.append(partial(delattr, model, name))
    setattr(model, ATTRIBUTE, memory)


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The model's own generate, after refusing what would not write each token once. It begins a context."""
    check_generate(model, args, kwargs)
    contexts = memory_of(model).call.contexts
    contexts.begin()
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        contexts.begin()


def _adapter(config: Mapping[str, Any]) -> DeltaMemAdapter:
    """Check the config by the common schema, and load its adapter; an adapter object stands in for a folder."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"mem_triton must be a mapping, got {type(config).__name__}")
    section = config.get("delta")
    given = section.get("adapter") if isinstance(section, Mapping) else None
    if isinstance(given, DeltaMemAdapter):
        config = {**config, "delta": {**section, "adapter": given.fingerprint}}
    parsed = parse_config(config)
    if parsed.delta is None:
        raise ConfigError("mem_triton.delta is missing: name the adapter, {'delta': {'adapter': folder or id}}")
    engine_only = sorted(parsed.model_fields_set - {"delta"}) + [
        f"delta.{key}" for key in sorted(parsed.delta.model_fields_set & {"scope", "tokens_per_state"})
    ]
    if engine_only:
        raise ConfigError(
            f"mem_triton.{engine_only[0]} is for serving engines, not for transformers: remove it "
            "(save_memory and load_memory keep a memory on disk)"
        )
    if isinstance(given, DeltaMemAdapter):
        if parsed.delta.revision is not None:
            raise ConfigError("mem_triton.delta.revision goes with a Hugging Face id, not with a loaded adapter")
        return given
    return load_adapter(parsed.delta.adapter, parsed.delta.revision)


def _same(weights: DeltaMemLayerWeights) -> DeltaMemLayerWeights:
    return weights
