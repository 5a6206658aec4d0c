"""Specification of ``attention_inputs`` in plain torch; any float dtype, nothing in place.

What stands between a decoder layer's fused projection and its attention when δ-mem corrects it (arXiv 2605.12357,
section 3): x += Δ r for the columns that are corrected, then what the model itself does, RMS norm of each head of q and
k (Qwen3) and rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.attention_inputs.types import HeadInputs


def attention_inputs_reference(qkv: Tensor, reads: Tensor, positions: Tensor, inputs: HeadInputs) -> Tensor:
    """Compute q | k | v as attention takes them. qkv: [T, (Hq + 2 Hkv) * D]; reads: [T, H*r]; positions: int [T].

    Computes in the dtype of ``qkv``; pass fp32 or fp64.
    """
    x = qkv.clone().unflatten(-1, (-1, inputs.head_dim))  # [T, Hq + 2 Hkv, D]
    row = 0
    for letter in "qkv":
        first, count = inputs.part(letter)
        part = x[:, first : first + count]
        if letter in inputs.corrects:
            delta = inputs.delta[row : row + count * inputs.head_dim].to(x.dtype)
            part += (reads.to(x.dtype) @ delta.T).view_as(part)
            row += count * inputs.head_dim
        norm = {"q": inputs.q_norm, "k": inputs.k_norm, "v": None}[letter]
        if norm is not None:
            part *= torch.rsqrt(part.square().mean(-1, keepdim=True) + inputs.eps) * norm.to(x.dtype)
        if inputs.cos_sin is not None and letter != "v":
            part[..., : inputs.rotated] = _rotate(part[..., : inputs.rotated], positions, inputs)
    return x.flatten(1)


def _rotate(x: Tensor, positions: Tensor, inputs: HeadInputs) -> Tensor:
    """x: [T, heads, R]."""
    cos, sin = inputs.cos_sin.to(x.dtype)[positions][:, None].chunk(2, dim=-1)
    a, b = (x[..., ::2], x[..., 1::2]) if inputs.interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if inputs.interleaved else torch.cat(turned, dim=-1)
