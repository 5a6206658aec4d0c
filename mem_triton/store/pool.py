"""A pool of memory pages: a fixed piece of device memory beside the engine's KV cache.

It is allocated before the engine measures how much memory is left, so the KV cache gets what remains. Which entry lies
in which pages is decided elsewhere (``runtime.residency``); filling them in the background is ``loader``'s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.types import MemoryPages
from mem_triton.store.block import MemoryBlock

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


class Packed(NamedTuple):
    """An entry in a pool's own form, page after page; scales for 8-bit pools alone."""

    data: Tensor  # [L, n, Hkv, P, 2D], keys then values
    key_scale: Tensor | None  # fp32 [L, n, Hkv, D]
    value_scale: Tensor | None  # fp32 [L, n, Hkv, P]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


class PagePool:
    """``num_pages`` pages of ``page_tokens`` tokens in each of ``num_layers`` layers.

    dtype: the model's, or int8 or float8_e4m3fn with fp32 scales, keys by channel and values by token of a page.

    Example::

        pool = PagePool(18, 8, 128, page_tokens=8, num_pages=5000, dtype=torch.bfloat16, device=torch.device("cuda"))
        pool.write([17, 4], pool.pack(block))
        pages = pool.layer(0)                     # what ``memory_attention`` reads in the first memory layer
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_tokens, self.head_dim, self.dtype, self.device = page_tokens, head_dim, dtype, device
        shape = (num_layers, num_pages, kv_heads)
        self._data = torch.zeros(*shape, page_tokens, 2 * head_dim, dtype=dtype, device=device)
        self._key_scale = self._value_scale = None
        if dtype in EIGHT_BIT:
            self._key_scale = torch.ones(*shape, head_dim, device=device)
            self._value_scale = torch.ones(*shape, page_tokens, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return Packed(self._data, self._key_scale, self._value_scale).nbytes

    @staticmethod
    def bytes_for(
        num_pages: int, *, num_layers: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype
    ) -> int:
        """Bytes that a pool of so many pages takes."""
        scales = 4 * (head_dim + page_tokens) if dtype in EIGHT_BIT else 0
        return num_pages * num_layers * kv_heads * (page_tokens * 2 * head_dim * dtype.itemsize + scales)

    @classmethod
    def pages_for_bytes(cls, nbytes: int, **shape: int | torch.dtype) -> int:
        """The most pages that fit; arguments as in ``bytes_for``. A model stage without memory layers needs none."""
        return nbytes // max(1, cls.bytes_for(1, **shape))

    def layer(self, index: int) -> MemoryPages:
        """Views of one layer's pages."""
        keys, values = self._data[index].split(self.head_dim, dim=-1)
        if self._key_scale is None:
            return MemoryPages(keys, values)
        return MemoryPages(keys, values, self._key_scale[index], self._value_scale[index])

    def pack(self, block: MemoryBlock) -> Packed:
        """A block [L, Hkv, T, D] in pages, in the pool's dtype; for a GPU in pinned memory."""
        pages = -(-block.tokens // self.page_tokens)
        empty = pages * self.page_tokens - block.tokens
        keys, values = (
            torch.nn.functional.pad(x, (0, 0, 0, empty)).unflatten(2, (pages, self.page_tokens)).transpose(1, 2)
            for x in (block.keys, block.values)
        )  # [L, n, Hkv, P, D]
        key_scale = value_scale = None
        if self.dtype in EIGHT_BIT:
            from mem_triton.ops.block_codec import quantise_pages

            keys, values, key_scale, value_scale = quantise_pages(keys, values, self.dtype)
        packed = Packed(torch.cat([keys.to(self.dtype), values.to(self.dtype)], dim=-1), key_scale, value_scale)
        if self.device.type != "cuda":
            return packed
        return Packed(*(None if tensor is None else tensor.pin_memory() for tensor in packed))

    def write(self, pages: list[int], packed: Packed) -> None:
        """Put a packed entry into ``pages``, in order; on a GPU on the current stream, without waiting."""
        index = torch.tensor(pages, device="cpu")
        if self.device.type == "cuda":
            index = index.pin_memory().to(self.device, non_blocking=True)
        for pool, part in zip((self._data, self._key_scale, self._value_scale), packed, strict=True):
            if pool is not None:
                raw = torch.int8 if pool.dtype in EIGHT_BIT else pool.dtype  # fp8 has no index_copy
                pool.view(raw).index_copy_(1, index, part.view(raw).to(self.device, non_blocking=True))
