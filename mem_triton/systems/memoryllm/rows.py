"""Rows on their way between processes: the bytes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(rows: Tensor) -> bytes:
    """The numbers of a tensor in memory, in order."""
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of its own. shape: one size may be -1. Raises ValueError if the bytes are none of that shape."""
    try:
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{len(data)} bytes are no rows {list(shape)} of {dtype}: {error}") from None
