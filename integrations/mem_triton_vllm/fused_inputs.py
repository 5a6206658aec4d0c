"""Launches one kernel between projection and attention, where vLLM would launch norm and RoPE.

Why: a decode step of δ-mem is launches, not bytes; here its own ones take the place of the model's. Upstream: vLLM
fuses q/k norm with RoPE by a compiler pass, with no place for a correction before them. It can go when there is one.

The layer's projection does it all (a token's position is its place in its row); its norms and rotary embedding, which
the model's ``forward`` calls next, pass on what they get. Only for models whose ``forward`` does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from mem_triton.ops.attention_inputs import HeadInputs
from mem_triton.systems.delta_mem.folding import fold
from mem_triton.systems.delta_mem.layer_memory import DeltaMemory, has_launches
from mem_triton.systems.delta_mem.section import Scope
from mem_triton_vllm.layers import StandIn

MODELS = {
    f"vllm.model_executor.models.{name}"
    for name in ("llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention")
}


def obstacle(module: nn.Module, device: torch.device, scope: Scope = "all") -> str | None:
    """Why this attention module keeps its own matmul, norm and RoPE; None if the kernel may do them."""
    if scope == "sessions":
        return "requests without a session get the model's own bits"
    if not has_launches(device):
        return "a CPU launches nothing"
    kind, rotary = type(module), getattr(module, "rotary_emb", None)
    if f"{kind.__module__}.{kind.__qualname__}" not in MODELS:
        return f"{kind.__qualname__} is not among the models whose forward is known"
    if getattr(module, "dual_chunk_attention_config", None):
        return "dual-chunk attention rotates queries in its own way"
    plain = ("forward_native", "forward_cuda")
    if any(getattr(type(rotary), name, None) is not getattr(RotaryEmbedding, name) for name in plain):
        return f"{type(rotary).__name__} is no table of cosines and sines by position alone"
    for norm in _norms(module):
        if type(norm) is not RMSNorm or norm.variance_size_override is not None or not norm.has_weight:
            return f"{type(norm).__name__} of its heads is no plain RMS norm"
    return None


def head_inputs(module: nn.Module, memory: DeltaMemory) -> HeadInputs:
    """What the kernel does to the heads of a module that has no ``obstacle``."""
    norms, rotary = _norms(module), module.rotary_emb
    return memory.head_inputs(
        module.attn.num_heads,
        module.attn.num_kv_heads,
        module.attn.head_size,
        q_norm=norms[0].weight.data if norms else None,
        k_norm=norms[1].weight.data if norms else None,
        eps=norms[0].variance_epsilon if norms else 0.0,
        cos_sin=rotary.cos_sin_cache,
        interleaved=not rotary.is_neox_style,
    )


def _norms(module: nn.Module) -> tuple[nn.Module, ...]:
    if not getattr(module, "qk_norm", True):  # Qwen2 has them by configuration
        return ()
    return tuple(getattr(module, name) for name in ("q_norm", "k_norm") if hasattr(module, name))


class QKVAsInputs(StandIn):
    """Stands in for ``qkv_proj``: gives q, k and v as attention takes them.

    prepare: (projected [T, >= q + k + v], projections [T, P], reads) -> None, the engine's op, in place; projections
    None = they are the columns behind q, k and v.
    """

    def __init__(
        self, base: nn.Module, memory: DeltaMemory, prepare: Callable[[Tensor, Tensor | None, Tensor], None]
    ) -> None:
        super().__init__(base)
        object.__setattr__(self, "memory", memory)  # shared with the output's wrapper
        self.width, self.prepare = sum(memory.sizes), prepare
        self.folded = fold(base, memory, QKVParallelLinear, UnquantizedLinearMethod)

    def forward(self, hidden: Tensor) -> Any:
        flat = hidden.flatten(0, -2)
        if self.folded is not None:
            projected, projections = self.folded(flat), None
            bias = (None,) if self.base.return_bias else ()
        else:
            result = self.base(hidden)
            out, *bias = result if isinstance(result, tuple) else (result,)
            projected, projections = out.flatten(0, -2), self.memory.project(flat)
        self.prepare(projected, projections, self.memory.reads[: flat.shape[0]])
        qkv = projected[:, : self.width].unflatten(0, hidden.shape[:-1])
        return (qkv, *bias) if bias else qkv


class Passed(StandIn):
    """Stands in for a norm or a rotary embedding whose work is done: gives back what it gets, without positions."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return inputs[0] if len(inputs) == 1 else inputs[1:]


def install(module: nn.Module, memory: DeltaMemory, prepare: Callable[[Tensor, Tensor | None, Tensor], None]) -> str:
    """Put the stand-ins into an attention module that has no ``obstacle``; returns how, for the log."""
    module.qkv_proj = QKVAsInputs(module.qkv_proj, memory, prepare)
    module.rotary_emb = Passed(module.rotary_emb)
    if _norms(module):
        module.q_norm, module.k_norm = Passed(module.q_norm), Passed(module.k_norm)
    whose = "the model's" if module.qkv_proj.folded is not None else "their own"
    return f"norm and RoPE in its launch, projections in {whose} matmul"
