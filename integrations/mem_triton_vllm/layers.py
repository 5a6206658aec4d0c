"""The two wrappers that carry δ-mem into a decoder layer: around ``qkv_proj`` and around ``o_proj``.

Every dense vLLM decoder calls ``qkv_proj`` with its hidden states and ``o_proj`` with what it attended. The input of
the first is the hidden state that δ-mem projects; its output is before q/k norm and RoPE, where Δq, Δk and Δv belong.
The output of the second is already reduced over tensor-parallel ranks, so Δo is added once, whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_triton.delta_mem import DeltaMemLayerWeights
from mem_triton_vllm import state_cache  # noqa: F401  registers the op that DeltaMemory calls

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
    """One layer's δ-mem weights on this rank. Holds the reads between the two wrappers.

    reads: fp32 [max_num_batched_tokens, H*r], one buffer for all layers (a layer's Δo is added before the next reads).
    sizes: widths of this rank's q, k and v in the fused projection.
    """

    def __init__(
        self, weights: DeltaMemLayerWeights, sizes: tuple[int, int, int], reads: Tensor, state_name: str, fuse: bool
    ) -> None:
        super().__init__()
        self.sizes, self.reads, self.state_name, self.fuse = sizes, reads, state_name, fuse
        for name in ("down", "gate_bias", "delta_q", "delta_k", "delta_v", "delta_o", "o_rmsnorm_weight"):
            self.register_buffer(name, getattr(weights, name), persistent=False)
        self.o_rmsnorm_eps = weights.o_rmsnorm_eps

    def read(self, hidden: Tensor) -> Tensor:
        """Advance the states by these tokens, [T, hidden], and return their reads, [T, H*r] fp32."""
        projections = F.linear(hidden, self.down)  # [T, P]
        reads = self.reads[: hidden.shape[0]]
        torch.ops.mem_triton.delta_rule_layer(projections, self.gate_bias, reads, self.state_name)
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


class _Wrapper(nn.Module):
    """A projection followed by a correction of its output.

    vLLM's own models call projections with [T, width] and get (output, bias); its transformers backend has a batch
    dimension of 1 in front and gets the output alone.
    """

    def __init__(self, base: nn.Module, memory: DeltaMemory) -> None:
        super().__init__()
        self.base = base
        object.__setattr__(self, "memory", memory)  # shared by two wrappers; DeltaMemory has no place of its own

    def __getattr__(self, name: str) -> Any:
        """Whatever else a model asks of its projection (sizes, weights) is the projection's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        result = self.base(inputs)
        out = result[0] if isinstance(result, tuple) else result
        corrected = self.correct(inputs.flatten(0, -2), out.flatten(0, -2)).view(out.shape)
        return (corrected, *result[1:]) if isinstance(result, tuple) else corrected


class QKVWithMemory(_Wrapper):
    """Stands in for ``qkv_proj``: stock projection, then the memory's read and corrections."""

    def correct(self, hidden: Tensor, qkv: Tensor) -> Tensor:
        return self.memory.correct_qkv(qkv, self.memory.read(hidden))


class OutputWithMemory(_Wrapper):
    """Stands in for ``o_proj``: stock projection (already reduced over ranks), then Δo."""

    def correct(self, attended: Tensor, out: Tensor) -> Tensor:
        return self.memory.correct_output(out)
