"""δ-mem (arXiv 2605.12357): adapters, their configuration, and their weights as engines compute with them."""

from __future__ import annotations

from mem_triton.systems.delta_mem.adapter import (
    AdapterError,
    DeltaMemAdapter,
    adapter_from_tensors,
    load_adapter,
    save_adapter,
)
from mem_triton.systems.delta_mem.config import DeltaMemConfig
from mem_triton.systems.delta_mem.layer import AttentionDims, DeltaMemLayerWeights, pack_layer, tensor_shapes

__all__ = [
    "AdapterError",
    "AttentionDims",
    "DeltaMemAdapter",
    "DeltaMemConfig",
    "DeltaMemLayerWeights",
    "adapter_from_tensors",
    "load_adapter",
    "pack_layer",
    "save_adapter",
    "tensor_shapes",
]
