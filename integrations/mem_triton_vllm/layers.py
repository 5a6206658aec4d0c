"""Wraps ``qkv_proj`` and ``o_proj`` of a decoder layer, to correct by δ-mem what they give.

Every dense vLLM decoder calls ``qkv_proj`` with its hidden states and ``o_proj`` with what it attended. The input of
the first is the hidden state that δ-mem projects; its output is before q/k norm and RoPE, where Δq, Δk and Δv belong.
The output of the second is already reduced over tensor-parallel ranks, so Δo is added once, whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mem_triton.systems.delta_mem.layer_memory import DeltaMemory


class StandIn(nn.Module):
    """In the place of one of a model's modules, ``base``."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Whatever else a model asks of its module (sizes, weights) is the module's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class _Corrected(StandIn):
    """A projection followed by a correction of its output.

    vLLM's own models call projections with [T, width] and get (output, bias); its transformers backend has a batch
    dimension of 1 before those and gets the output alone.
    """

    def __init__(self, base: nn.Module, memory: DeltaMemory) -> None:
        super().__init__(base)
        object.__setattr__(self, "memory", memory)  # shared by two wrappers; DeltaMemory has no place of its own

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        result = self.base(inputs)
        out = result[0] if isinstance(result, tuple) else result
        corrected = self.correct(inputs.flatten(0, -2), out.flatten(0, -2)).view(out.shape)
        return (corrected, *result[1:]) if isinstance(result, tuple) else corrected


class QKVWithMemory(_Corrected):
    """Stands in for ``qkv_proj``: stock projection, then the memory's read and corrections."""

    def correct(self, hidden: Tensor, qkv: Tensor) -> Tensor:
        return self.memory.correct_qkv(qkv, self.memory.read(hidden))


class OutputWithMemory(_Corrected):
    """Stands in for ``o_proj``: stock projection (already reduced over ranks), then Δo."""

    def correct(self, attended: Tensor, out: Tensor) -> Tensor:
        return self.memory.correct_output(out)
