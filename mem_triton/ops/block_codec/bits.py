"""Indices of a few bits each, packed one behind the other; the least significant bit comes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack(indices: Tensor, widths: Sequence[int]) -> Tensor:
    """int64 [N, parts], part i below 2**widths[i], to uint8 [N, ceil(sum of widths / 8)]."""
    columns = [(indices[:, i, None] >> torch.arange(width)) & 1 for i, width in enumerate(widths)]
    return torch.from_numpy(np.packbits(torch.cat(columns, 1).numpy().astype(np.uint8), axis=1, bitorder="little"))


def unpack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """The inverse of ``pack``."""
    flat = torch.from_numpy(np.unpackbits(codes.contiguous().numpy(), axis=1, count=sum(widths), bitorder="little"))
    columns = flat.long().split(list(widths), dim=1)
    return torch.stack([(c << torch.arange(c.shape[1])).sum(1) for c in columns], 1)
