"""Finds how a stock backend keeps keys and values in a KV-cache block, from what its own cache update writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention.arguments.packing import Packing, learn


class CacheLayout(NamedTuple):
    """packing: None where a token's key and value lie together, as vLLM's GPU backends have them. size: D."""

    size: int
    packing: Packing | None = None

    def split(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a cache [blocks, Hkv, N, 2D]: [blocks, Hkv, N, D] each, or packed [blocks, Hkv, N * D]."""
        if self.packing is None:
            return cache.split(self.size, dim=-1)
        return cache.view(*cache.shape[:2], 2, -1).unbind(2)


def layout_of_cache(name: str, layer: Any, spec: Any, device: torch.device) -> CacheLayout:
    """The layout of a layer's KV cache. spec: vLLM's of the cache. Raises ConfigError naming the layer and its backend.

    The backend's cache update is shown a block of its own, of the size that serving has.
    """
    heads, tokens, size = spec.num_kv_heads, spec.block_size, layer.impl.head_size
    dtype = layer.dtype
    if layer.kv_cache_torch_dtype != dtype:
        return CacheLayout(size)  # only its own backend reads it

    def written(key: Tensor, value: Tensor) -> Tensor:
        cache = torch.zeros(2, heads, tokens, 2 * size, dtype=dtype, device=device)
        slots = torch.arange(tokens, 2 * tokens, device=device)
        layer.impl.do_kv_cache_update(layer, key.to(device, dtype), value.to(device, dtype), cache, slots)
        return cache[1].cpu()

    key = torch.arange(1, tokens * heads * size + 1).view(tokens, heads, size).float() % 120
    block = written(key, -key).float()
    if torch.equal(block, torch.cat([key, -key], -1).transpose(0, 1)):
        return CacheLayout(size)
    try:
        if device.type != "cpu":
            raise ValueError("its blocks do not hold keys and values by token")
        halves = lambda key, value: written(key, value).view(heads, 2, -1).unbind(1)  # noqa: E731
        return CacheLayout(size, learn(halves, tokens, heads, size))
    except ValueError as error:
        backend = layer.attn_backend.get_name()
        raise ConfigError(
            f"memory in attention cannot read the KV cache of {name} as {backend} keeps it: {error}; choose another "
            "--attention-backend"
        ) from error
