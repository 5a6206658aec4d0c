"""A pool of memory pages: a fixed piece of device memory beside the engine's KV cache.

It is allocated before the engine measures how much memory is left, so the KV cache gets what remains. Which entry lies
in which pages is decided elsewhere (``store.pool.residency``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import MemoryPages
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.pages import Packed, PageLayout

__all__ = ["Packed", "PagePool"]


class PagePool:
    """``num_pages`` pages of ``page_tokens`` tokens in each of ``num_layers`` layers.

    dtype: fp32, fp16, bf16, or int8 and float8_e4m3fn with fp32 scales, keys by channel and values by token of a page.
    The layers of a page lie together (``pages``), so that a fetch is one copy for each run of neighbouring pages,
    with no kernel and no staging memory. Raises ValueError naming the argument that cannot be.

    Example::

        pages = PagePool.pages_for_bytes(2 << 30, num_layers=18, kv_heads=8, head_dim=128, page_tokens=8,
                                         dtype=torch.bfloat16)
        pool = PagePool(18, 8, 128, 8, pages, torch.bfloat16, torch.device("cuda"))
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
        device: torch.device | str,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: {num_pages} must be at least 1; give mem_triton.memory.pool_gib more")
        self.layout = PageLayout(num_layers, kv_heads, head_dim, page_tokens, dtype)
        self.num_pages, self.page_tokens, self.head_dim, self.dtype = num_pages, page_tokens, head_dim, dtype
        self._records = torch.zeros(num_pages, self.layout.data_bytes, dtype=torch.uint8, device=device)
        self.device = self._records.device
        self._data = self.layout.view_data(self._records)  # [L, pages, Hkv, P, 2D]
        self._key_scale = self._value_scale = None
        if self.layout.has_scales:  # by layer and contiguous, as kernels read them
            shape = num_layers, num_pages, kv_heads
            self._key_scale = torch.ones(*shape, head_dim, dtype=torch.float32, device=device)
            self._value_scale = torch.ones(*shape, page_tokens, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.num_pages * self.layout.page_bytes

    @staticmethod
    def bytes_for(
        num_pages: int, *, num_layers: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype
    ) -> int:
        """Bytes that a pool of so many pages takes."""
        return num_pages * PageLayout(num_layers, kv_heads, head_dim, page_tokens, dtype).page_bytes

    @staticmethod
    def pages_for_bytes(
        nbytes: int, *, num_layers: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype
    ) -> int:
        """The most pages that fit, 0 if not one does."""
        return nbytes // PageLayout(num_layers, kv_heads, head_dim, page_tokens, dtype).page_bytes

    def layer(self, index: int) -> MemoryPages:
        """Views of one layer's pages; they show what is written later, too."""
        keys, values = self._data[index].split(self.head_dim, dim=-1)
        if self._key_scale is None:
            return MemoryPages(keys, values)
        return MemoryPages(keys, values, self._key_scale[index], self._value_scale[index])

    def pack(self, block: MemoryBlock) -> Packed:
        """A placed block [L, Hkv, T, D] as records on the host, in page-locked memory if the pool is on a GPU."""
        pages = self.layout.pages_for(block.tokens)
        return self.layout.pack(block, self.layout.empty(pages, pinned=self.device.type == "cuda"))

    def write(self, pages: Sequence[int], packed: Packed, rows: Sequence[int] | None = None) -> None:
        """Copy records into ``pages``. rows: which of ``packed``, one a page; None = all in order.

        On a GPU asynchronous, on the current stream: until that has done it the pages may not be read, nor ``packed``
        be changed. Raises ValueError if numbers, pages or the records' form do not fit, and has written nothing then.
        """
        rows = range(len(packed.data)) if rows is None else rows
        if len(rows) != len(pages):
            raise ValueError(f"pages: {len(pages)} pages for {len(rows)} records")
        if (packed.data.shape[1], packed.scales.shape[1]) != (self.layout.data_bytes, self.layout.scale_bytes):
            raise ValueError(f"packed: made for pages of another shape or precision than {self.layout}")
        outside = [page for page in pages if not 0 <= page < self.num_pages]
        if outside:
            raise ValueError(f"pages: {outside[0]} is not one of the pool's {self.num_pages}")
        for page, row, count in _runs(pages, rows):
            here, there = slice(page, page + count), slice(row, row + count)
            self._records[here].copy_(packed.data[there], non_blocking=True)
            if self.layout.has_scales:
                scales = self.layout.view_scales(packed.scales[there].to(self.device, non_blocking=True))
                for target, scale in zip((self._key_scale, self._value_scale), scales, strict=True):
                    target[:, here].copy_(scale)

    def write_layer(self, layer: int, pages: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Put tokens [Hkv, T, D] of one layer, which are on the device, into ``pages``, on the current stream.

        Tails of pages become zero. Raises ValueError if they do not fit, or if the pages are 8 bit wide.
        """
        count, (heads, tokens, size) = len(pages), keys.shape
        if self.layout.has_scales:
            raise ValueError(f"pages: {self.dtype} pages take packed blocks alone")
        if count != self.layout.pages_for(tokens) or keys.shape != values.shape:
            raise ValueError(f"pages: {count} pages for keys {tuple(keys.shape)} and values {tuple(values.shape)}")
        both = torch.cat([keys, values], -1).to(self.dtype)
        both = torch.nn.functional.pad(both, (0, 0, 0, count * self.page_tokens - tokens))
        index = torch.tensor(list(pages), device=self.device)
        self._data[layer][index] = both.view(heads, count, self.page_tokens, 2 * size).transpose(0, 1)

    def read(self, pages: Sequence[int]) -> Packed:
        """The records that lie in ``pages``, on the host. Waits for the GPU: for tests and inspection."""
        index = torch.tensor(list(pages), dtype=torch.long, device=self.device)
        out = self.layout.empty(len(index))
        out.data.copy_(self._records[index])
        if self.layout.has_scales:
            scales = self._key_scale[:, index], self._value_scale[:, index]
            for target, scale in zip(self.layout.view_scales(out.scales), scales, strict=True):
                target.copy_(scale)
        return out


def _runs(pages: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(page, row, count) of the longest stretches in which pages and rows both go up by one."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1 or rows[i] != rows[i - 1] + 1:
            yield pages[start], rows[start], i - start
            start = i
