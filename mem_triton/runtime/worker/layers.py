"""δ-mem in a decoder layer: what one layer's weights add to the projections around its attention.

An engine calls ``read`` with the hidden state that goes into ``qkv_proj``, adds Δq, Δk and Δv to that projection's
output, before q/k norm and RoPE, and Δo to the output of ``o_proj``: once, whole, over all tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.delta_mem import DeltaMemLayerWeights

FUSED_ADD_WIDTH = 16
"""Up to this read width a compiled model adds Δ as multiply-adds that Inductor fuses; beyond it a matmul is cheaper."""


def add_correction(x: Tensor, reads: Tensor, weight: Tensor, fuse: bool) -> Tensor:
    """x + reads @ weight.T. x: [T, width]; reads: fp32 [T, H*r]; weight: [width, H*r], the scale folded in."""
    if not fuse or weight.shape[1] > FUSED_ADD_WIDTH:
        return x + F.linear(reads.to(x.dtype), weight)
    for i in range(weight.shape[1]):
        x = x + reads[:, i : i + 1].to(x.dtype) * weight[:, i]
    return x


class DeltaMemory(nn.Module):
    """One layer's δ-mem weights on this rank. Holds the reads between the two projections.

    sizes: widths of this rank's q, k and v in the fused projection. fuse: whether a compiler fuses what is added.
    reads: fp32 [tokens of the longest step, H*r], one buffer for all layers (a layer's Δo is added before the next
        layer reads).
    step: (projections [T, P], gate_bias, reads [T, H*r]) -> None; the engine's way to advance this layer's states by
        the step's tokens and to write what they read.
    """

    def __init__(
        self,
        weights: DeltaMemLayerWeights,
        sizes: tuple[int, int, int],
        reads: Tensor,
        step: Callable[[Tensor, Tensor, Tensor], None],
        fuse: bool,
    ) -> None:
        super().__init__()
        self.sizes, self.reads, self.step, self.fuse = sizes, reads, step, fuse
        for name in ("down", "gate_bias", "delta_q", "delta_k", "delta_v", "delta_o", "o_rmsnorm_weight"):
            self.register_buffer(name, getattr(weights, name), persistent=False)
        self.o_rmsnorm_eps = weights.o_rmsnorm_eps

    def read(self, hidden: Tensor) -> Tensor:
        """Advance the states by these tokens, [T, hidden], and return their reads, [T, H*r] fp32."""
        reads = self.reads[: hidden.shape[0]]
        self.step(F.linear(hidden, self.down), self.gate_bias, reads)
        return reads

    def correct_qkv(self, qkv: Tensor, reads: Tensor) -> Tensor:
        """Add Δq, Δk and Δv to the fused projection, [T, q + k + v]."""
        deltas = (self.delta_q, self.delta_k, self.delta_v)
        if all(delta is None for delta in deltas):
            return qkv
        parts = [
            part if delta is None else add_correction(part, reads, delta, self.fuse)
            for part, delta in zip(qkv.split(self.sizes, dim=-1), deltas, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def correct_output(self, out: Tensor) -> Tensor:
        """Add Δo, optionally RMS-normalised, to the attention output [T, hidden]."""
        if self.delta_o is None:
            return out
        reads = self.reads[: out.shape[0]]
        if self.o_rmsnorm_weight is None:
            return add_correction(out, reads, self.delta_o, self.fuse)
        delta = F.linear(reads.to(out.dtype), self.delta_o).float()
        return out + F.rms_norm(delta, delta.shape[-1:], self.o_rmsnorm_weight, self.o_rmsnorm_eps).to(out.dtype)
