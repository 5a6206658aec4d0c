"""Lays a page of memory out in bytes: one record with all its layers, so that fetching a page is one copy.

A record is ``[L, Hkv, P, 2D]``, keys and values side by side. Where data are 8 bit wide, a second one holds the scales:
fp32 ``[L, Hkv, D]`` of the keys' channels, then ``[L, Hkv, P]`` of the values' tokens. Host and device hold the same
records, so a fetch moves bytes, and what was placed and quantised once is never computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mem_triton.ops.block_codec import quantise_pages
from mem_triton.store.block import MemoryBlock

GIB = 2**30
"""Bytes of a GiB, in which configurations and logs count device memory."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)

_ALIGNMENT = 256
"""Bytes; a record starts at a multiple, so that a page's rows can be loaded in vectors."""


class Packed(NamedTuple):
    """Records of some pages on the host."""

    data: Tensor  # uint8 [pages, data_bytes]
    scales: Tensor  # uint8 [pages, scale_bytes]

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.data.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class PageLayout:
    """Shape and precision of a page. dtype: fp32, fp16, bf16, or int8 and float8_e4m3fn with scales per page.

    Raises ValueError naming the field that cannot be. Example::

        layout = PageLayout(num_layers=18, kv_heads=8, head_dim=128, page_tokens=8, dtype=torch.bfloat16)
        layout.page_bytes                       # 589824
        layout.pack(block)                      # Packed
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("kv_heads", "head_dim", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.num_layers < 0:
            raise ValueError(f"num_layers: {self.num_layers} must not be negative")
        if self.dtype not in FLOATS + EIGHT_BIT:
            raise ValueError(f"dtype: {self.dtype} is none of {', '.join(map(str, FLOATS + EIGHT_BIT))}")

    @property
    def has_scales(self) -> bool:
        """Whether data are 8 bit wide; without layers there are none to scale."""
        return self.dtype in EIGHT_BIT and self.num_layers > 0

    @property
    def data_bytes(self) -> int:
        """Bytes of a page's record; some even without layers (a model stage may hold none of the memory's)."""
        return max(1, -(-self._used_bytes // _ALIGNMENT)) * _ALIGNMENT

    @property
    def scale_bytes(self) -> int:
        """Bytes of a page's scales."""
        return 4 * self.num_layers * self.kv_heads * (self.head_dim + self.page_tokens) if self.has_scales else 0

    @property
    def page_bytes(self) -> int:
        """Bytes that a page takes altogether."""
        return self.data_bytes + self.scale_bytes

    @property
    def _used_bytes(self) -> int:
        return self.num_layers * self.kv_heads * self.page_tokens * 2 * self.head_dim * self.dtype.itemsize

    def pages_for(self, tokens: int) -> int:
        """Pages that an entry of so many tokens per head takes."""
        return -(-tokens // self.page_tokens)

    def empty(self, pages: int, pinned: bool = False) -> Packed:
        """Room for records on the host, not initialised. pinned: page-locked, for asynchronous copies."""
        sizes = self.data_bytes, self.scale_bytes
        return Packed(*(torch.empty(pages, size, dtype=torch.uint8, pin_memory=pinned) for size in sizes))

    def view_data(self, data: Tensor) -> Tensor:
        """uint8 [pages, data_bytes] as what it holds, [L, pages, Hkv, P, 2D]."""
        used = data[:, : self._used_bytes].view(self.dtype)
        shape = self.num_layers, self.kv_heads, self.page_tokens, 2 * self.head_dim
        return used.unflatten(1, shape).transpose(0, 1)

    def view_scales(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [pages, scale_bytes] as fp32 [L, pages, Hkv, D] of the keys and [L, pages, Hkv, P] of the values."""
        shape = self.num_layers, self.kv_heads, self.head_dim + self.page_tokens
        both = scales.view(torch.float32).unflatten(1, shape).transpose(0, 1)
        return both[..., : self.head_dim], both[..., self.head_dim :]

    def pack(self, block: MemoryBlock, out: Packed | None = None) -> Packed:
        """A block as records, written to ``out`` if given. Unused tokens of a page are zero.

        Raises ValueError if the block has other layers, heads or head size than the pages, or numbers that float16
        pages cannot hold.
        """
        wanted = (self.num_layers, self.kv_heads, block.tokens, self.head_dim)
        for name in ("keys", "values"):
            shape = tuple(getattr(block, name).shape)
            if shape != wanted:
                raise ValueError(f"block.{name}: shape {shape}, the pool's pages take [L, Hkv, T, D] = {wanted}")
        pages = self.pages_for(block.tokens)
        out = self.empty(pages) if out is None else out
        if len(out.data) != pages:
            raise ValueError(f"out: room for {len(out.data)} pages, {block.tokens} tokens take {pages}")
        keys, values = self._paged(block.keys), self._paged(block.values)
        if self.has_scales:
            keys, values, key_scale, value_scale = quantise_pages(keys, values, self.dtype)
            for target, scale in zip(self.view_scales(out.scales), (key_scale, value_scale), strict=True):
                target.copy_(scale)
        data = self.view_data(out.data)
        data[..., : self.head_dim].copy_(keys)
        data[..., self.head_dim :].copy_(values)
        if self.dtype == torch.float16 != block.keys.dtype and not bool(data.isfinite().all()):
            raise ValueError(f"block: {block.keys.dtype} numbers beyond float16's range; serve with another dtype")
        out.data[:, self._used_bytes :] = 0  # equal blocks, equal records
        return out

    def unpack(self, packed: Packed, tokens: int) -> tuple[Tensor, Tensor]:
        """fp32 keys and values [L, Hkv, tokens, D] that records stand for."""
        keys, values = self.view_data(packed.data).float().split(self.head_dim, dim=-1)
        if self.has_scales:
            key_scale, value_scale = self.view_scales(packed.scales)
            keys, values = keys * key_scale.unsqueeze(-2), values * value_scale.unsqueeze(-1)
        return tuple(part.transpose(1, 2).flatten(2, 3)[:, :, :tokens] for part in (keys, values))

    def _paged(self, tensor: Tensor) -> Tensor:
        """[L, Hkv, T, D] cut into pages, zeros at the end: [L, pages, Hkv, P, D]."""
        missing = -tensor.shape[2] % self.page_tokens
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
        return tensor.unflatten(2, (-1, self.page_tokens)).transpose(1, 2)
