"""δ-mem adapters with random weights, for models that have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mem_triton.systems.delta_mem import (
    AttentionDims,
    DeltaMemAdapter,
    DeltaMemConfig,
    adapter_from_tensors,
    tensor_shapes,
)


def attention_dims(model_or_config: Any) -> dict[str, AttentionDims]:
    """Attention module name -> widths of a transformers model or config, from its config alone."""
    config = getattr(model_or_config, "config", model_or_config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    dims = AttentionDims(config.hidden_size, q, kv, kv, config.hidden_size)
    return {f"model.layers.{i}.self_attn": dims for i in range(config.num_hidden_layers)}


def random_adapter(
    model_or_dims: Any, *, seed: int = 1, strength: float = 0.3, dtype: torch.dtype = torch.float32, **config: Any
) -> DeltaMemAdapter:
    """A random adapter whose memory visibly changes tokens.

    model_or_dims: transformers model or config, or the result of ``attention_dims``. strength: std of the active
    ``delta_*_proj`` (inactive ones are zero, as the official code stores them). config: ``DeltaMemConfig`` keys.
    """
    dims = model_or_dims if isinstance(model_or_dims, Mapping) else attention_dims(model_or_dims)
    cfg = DeltaMemConfig(**config)
    generator = torch.Generator().manual_seed(seed)

    def values(key: str, shape: tuple[int, ...], hidden: int) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if key.endswith("_bias"):
            return (cfg.beta_bias_init if key == "beta_bias" else -cfg.beta_bias_init) + 0.3 * noise
        if key == "delta_o_rmsnorm_weight":
            return strength * (1 + 0.3 * noise)
        if key == "delta_scale_raw":
            return 0.5 * noise
        if key.startswith("delta_"):
            return strength * noise * (key.split("_")[1] in cfg.delta_heads)
        return noise / hidden**0.5  # memory_*, beta and lambda projections of a normed hidden state

    flat = {
        f"{name}.{key}": values(key, shape, widths.hidden).to(dtype)
        for name, widths in dims.items()
        if cfg.targets(name)
        for key, shape in tensor_shapes(cfg, widths).items()
    }
    return adapter_from_tensors(cfg, flat)
