"""Adds what one layer's δ-mem gives to the projections around its attention.

An engine calls ``read`` with the hidden state that goes into ``qkv_proj``, adds Δq, Δk and Δv to that projection's
output, before q/k norm and RoPE, and Δo to the output of ``o_proj``: once, whole, over all tensor-parallel ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.ops.attention_inputs import HeadInputs
from mem_triton.systems.delta_mem import DeltaMemLayerWeights

FUSED_ADD_WIDTH = 16
"""Up to this read width a compiled model adds Δ as multiply-adds that Inductor fuses; beyond it a matmul is cheaper."""

Linear = Callable[[Tensor], Tensor]


def has_launches(device: torch.device) -> bool:
    """Whether kernels are launched there, so that fewer are better."""
    return device.type != "cpu"


def plain_linear(weight: Tensor) -> Linear:
    """x -> x @ weight.T. weight: [out, in]."""
    return functools.partial(F.linear, weight=weight)


def add_correction(x: Tensor, reads: Tensor, weight: Tensor) -> None:
    """x += reads @ weight.T, in place. x: [T, width]; reads: fp32 [T, H*r]; weight: [width, H*r], the scale in it.

    The sum is in fp32 and rounded once. Given in fp32, a weight is multiplied in fp32: the quicker way on a CPU.
    """
    if x.dtype == weight.dtype:
        x.addmm_(reads.to(x.dtype), weight.t())
    else:
        x.copy_(torch.addmm(x.float(), reads, weight.t()))


def fused_correction(x: Tensor, reads: Tensor, weight: Tensor) -> Tensor:
    """x + reads @ weight.T as a compiler likes it: nothing in place, and weight in the dtype of x."""
    if weight.shape[1] > FUSED_ADD_WIDTH:
        return x + F.linear(reads.to(x.dtype), weight)
    for i in range(weight.shape[1]):
        x = x + reads[:, i : i + 1].to(x.dtype) * weight[:, i]
    return x


class DeltaMemory(nn.Module):
    """One layer's δ-mem weights on this rank. Holds the reads between the two projections.

    sizes: widths of this rank's q, k and v in the fused projection. fuse: whether a compiler fuses what is added; else
        it is added in place.
    reads: fp32 [tokens of the longest step, H*r], one buffer for all layers (a layer's Δo is added before the next
        layer reads).
    step: (projections [T, P], gate_bias, reads [T, H*r]) -> None; the engine's way to advance this layer's states by
        the step's tokens and to write what they read.
    linear: makes the engine's best matmul with a weight.
    rounded: the reads in the model's dtype, [tokens of the longest step, H*r], if ``step`` or what stands for it writes
        them: what Δo multiplies then.
    """

    def __init__(
        self,
        weights: DeltaMemLayerWeights,
        sizes: tuple[int, int, int],
        reads: Tensor,
        step: Callable[[Tensor, Tensor, Tensor], None],
        fuse: bool,
        linear: Callable[[Tensor], Linear] = plain_linear,
        rounded: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.reads, self.step, self.fuse, self.rounded = sizes, reads, step, fuse, rounded
        for name in ("down", "gate_bias", "o_rmsnorm_weight"):
            self.register_buffer(name, getattr(weights, name), persistent=False)
        for name in ("delta_q", "delta_k", "delta_v", "delta_o"):
            delta = getattr(weights, name)
            keep = delta is None or fuse or has_launches(delta.device)
            self.register_buffer(name, delta if keep else delta.float(), persistent=False)
        self.o_rmsnorm_eps = weights.o_rmsnorm_eps
        self.project = linear(self.down)

    def read(self, hidden: Tensor) -> Tensor:
        """Advance the states by these tokens, [T, hidden], and return their reads, [T, H*r] fp32."""
        reads = self.reads[: hidden.shape[0]]
        self.step(self.project(hidden), self.gate_bias, reads)
        return reads

    def head_inputs(self, heads: int, kv_heads: int, head_dim: int, **own: Any) -> HeadInputs:
        """This layer's corrections for ``ops.attention_inputs``. own: the model's norms and rotation there."""
        deltas = {letter: getattr(self, f"delta_{letter}") for letter in "qkv"}
        corrected = {letter: delta for letter, delta in deltas.items() if delta is not None}
        delta = torch.cat([*corrected.values()]) if corrected else None
        return HeadInputs(heads, kv_heads, head_dim, corrects="".join(corrected), delta=delta, **own)

    def correct_qkv(self, qkv: Tensor, reads: Tensor) -> Tensor:
        """Add Δq, Δk and Δv to the fused projection, [T, q + k + v]."""
        deltas = (self.delta_q, self.delta_k, self.delta_v)
        parts = qkv.split(self.sizes, dim=-1)
        if self.fuse and any(delta is not None for delta in deltas):
            pairs = zip(parts, deltas, strict=True)
            return torch.cat([p if d is None else fused_correction(p, reads, d) for p, d in pairs], dim=-1)
        for part, delta in zip(parts, deltas, strict=True):
            if delta is not None:
                add_correction(part, reads, delta)
        return qkv

    def correct_output(self, out: Tensor) -> Tensor:
        """Add Δo, optionally RMS-normalised, to the attention output [T, hidden]."""
        if self.delta_o is None:
            return out
        reads = self.reads[: out.shape[0]]
        if self.o_rmsnorm_weight is not None:
            delta = F.linear(reads, self.delta_o.float())
            return out + F.rms_norm(delta, delta.shape[-1:], self.o_rmsnorm_weight, self.o_rmsnorm_eps).to(out.dtype)
        if self.fuse:
            return fused_correction(out, reads, self.delta_o)
        add_correction(out, reads if self.rounded is None else self.rounded[: out.shape[0]], self.delta_o)
        return out
