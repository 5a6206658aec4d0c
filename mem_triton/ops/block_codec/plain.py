"""Codecs without training: the float dtypes, and 8 bits with scales."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.block_codec.reference import CodecError, Encoded, dequantise, quantise, to_codes
from mem_triton.ops.memory_attention.arguments.types import MemoryPages


class FloatCodec:
    """Keys and values in one float dtype: lossless for models of that dtype."""

    trained = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        return {"keys": self._cast("keys", keys), "values": self._cast("values", values)}

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return encoded["keys"].to(dtype), encoded["values"].to(dtype)

    def state(self) -> bytes:
        return b""

    def _cast(self, name: str, x: Tensor) -> Tensor:
        cast = x.to(self.dtype).contiguous()
        if not torch.equal(cast.isfinite(), x.isfinite()):
            raise CodecError(f"{name}: up to {x.abs().max():.3g}, more than {self.name} holds; use codec bf16")
        return cast


class ScaledCodec:
    """8 bits an element: keys with a scale per channel, values with one per token (``reference.quantise``).

    Scales are bf16 on the disk: with 8 tokens a head, fp32 ones would take half as much room as the keys.
    """

    trained = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        encoded = {}
        for name, x, dim in (("key", keys, 2), ("value", values, 3)):
            _finite(f"{name}s", x)
            _, scale = quantise(x, dim, self.dtype)
            scale = scale.to(torch.bfloat16)
            scale = torch.where(scale > 0, scale, 1.0).to(torch.bfloat16)  # elements below 1e-38 become 0
            codes = to_codes(x.float() / scale.float().unsqueeze(dim), self.dtype)  # for the scale as it is stored
            encoded |= {f"{name}s": codes.contiguous(), f"{name}_scale": scale.contiguous()}
        return encoded

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys = dequantise(encoded["keys"], encoded["key_scale"], 2)
        return keys.to(dtype), dequantise(encoded["values"], encoded["value_scale"], 3).to(dtype)

    def state(self) -> bytes:
        return b""


def quantise_pages(keys: Tensor, values: Tensor, dtype: torch.dtype, tokens: Tensor | None = None) -> MemoryPages:
    """Pages for a pool of 8 bits, which ``memory_attention`` dequantises in registers.

    keys, values: [..., Hkv, P, D] of any float dtype. dtype: torch.int8 or torch.float8_e4m3fn.
    tokens: int [...], how many of a page's P tokens are filled; the others become 0 and widen no scale. None = all.
    Returns keys and values in ``dtype``, key_scale fp32 [..., Hkv, D] and value_scale fp32 [..., Hkv, P].
    ValueError names the argument that does not fit. Example::

        data, values, key_scale, value_scale = quantise_pages(keys, values, torch.int8)
    """
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise CodecError(f"dtype: {dtype}, pages of 8 bits are torch.int8 or torch.float8_e4m3fn")
    if keys.shape != values.shape or keys.dim() < 3:
        raise CodecError(f"values: shape {tuple(values.shape)}, expected that of keys {tuple(keys.shape)}, [..., P, D]")
    if tokens is not None:
        if tokens.shape != keys.shape[:-3]:
            raise CodecError(f"tokens: shape {tuple(tokens.shape)}, expected {tuple(keys.shape[:-3])}")
        empty = torch.arange(keys.shape[-2], device=keys.device) >= tokens[..., None]  # [..., P]
        keys, values = (x.masked_fill(empty[..., None, :, None], 0) for x in (keys, values))
    _finite("keys", keys)
    _finite("values", values)
    key_codes, key_scale = quantise(keys, -2, dtype)
    value_codes, value_scale = quantise(values, -1, dtype)
    return MemoryPages(key_codes, value_codes, key_scale, value_scale)


def dequantise_pages(pages: MemoryPages, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values of 8-bit pages, as the attention kernel sees them."""
    keys, values, key_scale, value_scale = pages
    return dequantise(keys, key_scale, -2).to(dtype), dequantise(values, value_scale, -1).to(dtype)


def _finite(name: str, x: Tensor) -> None:
    if not x.isfinite().all():
        raise CodecError(f"{name}: infinite or NaN, which 8 bits do not hold")
