"""δ-mem (arXiv 2605.12357): adapters, their configuration, and their weights as engines compute with them.

The names are looked up when they are used: a configuration is checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "AdapterError": "adapter",
    "AttentionDims": "layer",
    "DeltaMemAdapter": "adapter",
    "DeltaMemConfig": "config",
    "DeltaMemLayerWeights": "layer",
    "adapter_from_tensors": "adapter",
    "load_adapter": "adapter",
    "pack_layer": "layer",
    "save_adapter": "adapter",
    "tensor_shapes": "layer",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
