"""What ops require of a tensor: shape, dtype, layout and device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    beside: tuple[str, Tensor],
) -> None:
    """Raise a ValueError that names the tensor if it does not fit.

    shape: None stands for any length. The last dimension must be contiguous. beside: name and tensor of what it must
    share its device with.
    """
    if tensor.dim() != len(shape) or not _fits(tensor.shape, shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)} (None = any)")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, its stride is {tensor.stride(-1)}")
    if tensor.device != beside[1].device:
        raise ValueError(f"{name}: on {tensor.device}, {beside[0]} on {beside[1].device}")


def _fits(shape: torch.Size, expected: tuple[int | None, ...]) -> bool:
    for have, want in zip(shape, expected, strict=True):  # noqa: SIM110, half the time: it runs in every layer and step
        if want is not None and have != want:
            return False
    return True
