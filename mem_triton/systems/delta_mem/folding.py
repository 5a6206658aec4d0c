"""Folds δ-mem's projections into the matmul of a layer's q, k and v, whose hidden states they share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.systems.delta_mem.layer_memory import DeltaMemory

ALIGNMENT = 32  # columns; what lies behind q, k and v must not spoil the alignment of the next token's row


class Folded(nn.Module):
    """weight: [rows, hidden]; bias: [rows] or None. Gives [T, rows].

    method: the engine's own way to multiply, which knows its batch-invariant mode and the platform.
    """

    def __init__(self, method: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.method.apply(self, hidden, self.bias)


def fold(base: nn.Module, memory: DeltaMemory, linear: type[nn.Module], method: type) -> Folded | None:
    """Rows of δ-mem's projections behind those of ``base``, whose own weight and bias become views of the whole.

    So updates of weights reach them. linear, method: the engine's classes of a fused projection whose weight is a plain
    matrix. None where it cannot be: quantised weights, LoRA, weights packed for a CPU.
    """
    width = sum(memory.sizes)
    if type(base) is not linear or type(base.quant_method) is not method:
        return None
    if base.gather_output or base.skip_bias_add or base.weight.shape[0] != width:
        return None
    own, total = memory.down, columns(width, len(memory.down))
    weight = torch.cat([base.weight.data, own, own.new_zeros(total - width - len(own), own.shape[1])])
    base.weight.data = weight[:width]
    bias = None
    if base.bias is not None:
        bias = F.pad(base.bias.data, (0, len(weight) - width))
        base.bias.data = bias[:width]
    return Folded(base.quant_method, weight, bias)


def columns(width: int, projections: int) -> int:
    """Of a folded projection: q | k | v, δ-mem's, and zeros up to the next multiple of ALIGNMENT."""
    return -(-(width + projections) // ALIGNMENT) * ALIGNMENT
