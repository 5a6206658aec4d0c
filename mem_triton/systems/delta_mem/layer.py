"""Names the tensors of one layer of an adapter, and packs them as engines compute with them.

Source: delta-Mem ``DeltaMemAttention``. With x the input of the attention module (after the input norm)::

    reads = delta rule of (down @ x, gate_bias)                       # [T, H*r]
    q, k, v += delta_{q,k,v} @ reads                                  # before q_norm, k_norm and RoPE
    o       += rmsnorm?(delta_o @ reads)                              # after o_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.systems.delta_mem.config import DeltaMemConfig


class AttentionDims(NamedTuple):
    """Widths of one attention module: its input, and the outputs of its q, k, v and o projections."""

    hidden: int
    q: int
    k: int
    v: int
    o: int


def tensor_shapes(config: DeltaMemConfig, dims: AttentionDims) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the official code stores per layer, inactive heads included."""
    reads, gates = config.spec.read_width, config.spec.gate_width
    shapes: dict[str, tuple[int, ...]] = {f"memory_{name}_proj": (reads, dims.hidden) for name in "qkv"}
    shapes |= {f"delta_{head}_proj": (getattr(dims, head), reads) for head in "qkvo"}
    shapes |= {"beta_proj": (gates, dims.hidden), "beta_bias": (gates,)}
    if not config.couple_lambda:
        shapes |= {"lambda_proj": (gates, dims.hidden), "lambda_bias": (gates,)}
    if config.trainable_delta_scale:
        shapes["delta_scale_raw"] = (config.scale_width,)
    if config.delta_o_rmsnorm:
        shapes["delta_o_rmsnorm_weight"] = (dims.o,)
    return shapes


@dataclass(frozen=True, eq=False)
class DeltaMemLayerWeights:
    """A layer's packed tensors, engine neutral; None for heads that the adapter leaves alone (no work for them).

    down: [P, hidden], rows q | k | v | beta [| lambda], as ``activate`` of ``ops.delta_rule`` splits its output.
    gate_bias: [bias_width], beta [| lambda]. delta_q, delta_k, delta_v, delta_o: [out, H*r] with the scale s folded in;
    a tensor-parallel engine shards the rows of q, k and v. o_rmsnorm_weight: [o] or None.
    """

    down: Tensor
    gate_bias: Tensor
    delta_q: Tensor | None
    delta_k: Tensor | None
    delta_v: Tensor | None
    delta_o: Tensor | None
    o_rmsnorm_weight: Tensor | None
    o_rmsnorm_eps: float

    def to(self, device: torch.device | str, dtype: torch.dtype) -> DeltaMemLayerWeights:
        """Copy to ``device``: projections in ``dtype``; gate bias and norm weight in at least fp32."""
        exact = {"gate_bias", "o_rmsnorm_weight"}
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value.to(device, torch.promote_types(dtype, torch.float32) if field.name in exact else dtype)
            moved[field.name] = value
        return DeltaMemLayerWeights(**moved)

    def correct_output(self, reads: Tensor) -> Tensor | None:
        """Compute Δo of reads, [..., H*r] -> [..., o], in the reads' dtype; None if o is not corrected."""
        if self.delta_o is None:
            return None
        delta = F.linear(reads, self.delta_o)
        if self.o_rmsnorm_weight is None:
            return delta
        weight = self.o_rmsnorm_weight
        return F.rms_norm(delta.to(weight.dtype), (delta.shape[-1],), weight, self.o_rmsnorm_eps).to(delta.dtype)


def pack_layer(config: DeltaMemConfig, tensors: Mapping[str, Tensor]) -> DeltaMemLayerWeights:
    """Pack one layer's named tensors. Differentiable; computes in at least fp32, so that folding s rounds nothing.

    tensors: as named and shaped by ``tensor_shapes``; see ``DeltaMemAdapter`` for the check.
    """
    exact = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}
    gates = ("beta",) if config.couple_lambda else ("beta", "lambda")
    rows = ("memory_q_proj", "memory_k_proj", "memory_v_proj", *(f"{gate}_proj" for gate in gates))
    scale = config.scale_factors(exact.get("delta_scale_raw"))
    active = {head: exact[f"delta_{head}_proj"] * scale[head] for head in config.delta_heads}
    return DeltaMemLayerWeights(
        down=torch.cat([exact[row] for row in rows]),
        gate_bias=torch.cat([exact[f"{gate}_bias"] for gate in gates]),
        **{f"delta_{head}": active.get(head) for head in "qkvo"},
        o_rmsnorm_weight=exact.get("delta_o_rmsnorm_weight") if "o" in active else None,
        o_rmsnorm_eps=config.delta_o_rmsnorm_eps,
    )
