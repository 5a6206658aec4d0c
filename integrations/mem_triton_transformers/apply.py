"""Put a memory on a model, and take it off again: δ-mem, or MemoryLLM's pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from mem_triton.config import ConfigError
from mem_triton_transformers import attach
from mem_triton_transformers.pools import POOLS, attach_pools, detach_pools


def apply_mem_triton(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """Give ``model`` a memory, in place; returns the model.

    config: ``{"delta": {"adapter": folder, Hugging Face id or DeltaMemAdapter, "revision": optional}}`` for δ-mem
    (``attach.apply_mem_triton``), or ``{"memoryllm": {"pools": folder, "default": "main", "chunk": 512}}`` for pools of
    a converted MemoryLLM (``pools.attach_pools``). Raises ConfigError for the config, and what these two raise.

    Example::

        apply_mem_triton(model, {"delta": {"adapter": "declare-lab/delta-mem_qwen3_4b-instruct"}})
    """
    if not isinstance(config, Mapping) or "memoryllm" not in config:
        if getattr(model, POOLS, None) is not None:
            raise ValueError("this model has pools, beside which δ-mem was not tried: remove_mem_triton(model) first")
        return attach.apply_mem_triton(model, config)
    if len(config) > 1:
        other = next(key for key in config if key != "memoryllm")
        raise ConfigError(f"mem_triton.{other}: was not tried beside memoryllm; give a model one of them")
    if getattr(model, attach.ATTRIBUTE, None) is not None:
        raise ValueError("this model has δ-mem, beside which pools were not tried: remove_mem_triton(model) first")
    return attach_pools(model, config["memoryllm"])


def remove_mem_triton(model: PreTrainedModel) -> PreTrainedModel:
    """Take memory off again; the model is then bit for bit the stock one. Raises ValueError if it has none."""
    return model if detach_pools(model) else attach.remove_mem_triton(model)
