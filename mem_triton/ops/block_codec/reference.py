"""What a codec is: keys and values to tensors for the disk and back, and how large the error may be.

A codec works on one block, keys and values [L, Hkv, T, D]. What it writes is laid out by layer and head, so that part
of a block can be read alone. Decoding depends on those tensors and the codec's state only: always the same bits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Encoded = dict[str, Tensor]
"""Tensors [L, Hkv, ...], as safetensors takes them."""


class CodecError(ValueError):
    """Data that a codec cannot represent, or a codec that cannot do what is asked. Names what and why."""


class Block(Protocol):
    """Anything with keys and values [L, Hkv, T, D], such as ``store.MemoryBlock``."""

    keys: Tensor
    values: Tensor


class Codec(Protocol):
    """A way to write a block. ``name``: what ``get_codec`` takes. ``trained``: False while ``encode`` would fail."""

    name: str
    trained: bool

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Encode keys and values [L, Hkv, T, D] of any float dtype. Raises CodecError for what it cannot hold."""

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys and values in ``dtype``, from all that ``encode`` wrote or from some layers and heads of it."""

    def state(self) -> bytes:
        """Return what training made; empty if there is nothing to train."""


# 8 bits, symmetric: x is stored as round(x / scale), the nearest code, with the largest |x| of its group at the largest
# code. Keys are grouped by channel, because a few channels of keys are large in every token; values by token.
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` in int8 or float8_e4m3fn, and their fp32 scales, one for all of ``dim``, which they lack."""
    x = x.float()
    scale = x.abs().amax(dim) / LARGEST_CODE[dtype]
    scale = torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale will do
    return to_codes(x / scale.unsqueeze(dim), dtype), scale


def to_codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest code, ties to even."""
    largest = LARGEST_CODE[dtype]
    x = x.clamp(-largest, largest)  # what rounding pushed over the edge
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)


def dequantise(codes: Tensor, scale: Tensor, dim: int) -> Tensor:
    """fp32: ``codes * scale``, in one rounding."""
    return codes.float() * scale.float().unsqueeze(dim)


def error_bound(x: Tensor, scale: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Largest error of each element: half a step of int8; of fp8 2**-4 of the element, half a step where subnormal."""
    step = scale.double().unsqueeze(dim)
    slack = x.double().abs() * 2**-21  # the division, the product and the comparison in fp32
    if dtype == torch.int8:
        return step / 2 + slack
    return torch.maximum(x.double().abs() * 2**-4, step * 2**-10) + slack
