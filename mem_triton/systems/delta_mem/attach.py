"""Attach memory to a loaded model, engine-neutral: which modules, which weights, and this rank's share of them.

An engine checks what it cannot serve, makes its own place for the states, and gives each layer's projections its
``DeltaMemory`` in its own way::

    modules = attention_modules(model, Attention, "δ-mem")
    layers = DeltaLayers(adapter, modules, shape, rank, device)
    for index, name in enumerate(layers.weights):
        memory = layers.memory(name, local_heads, local_kv_heads, step, fuse=True)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mem_triton.systems.delta_mem import AttentionDims, DeltaMemAdapter, DeltaMemLayerWeights
from mem_triton.systems.delta_mem.layer_memory import DeltaMemory
from mem_triton.systems.delta_mem.sessions import layer_order
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton.systems.engine import EngineShape


class DeltaLayers:
    """The layers of an adapter that a rank has. weights: whole, by module name, in the model's order.

    names: of this rank's attention modules. rank: among those that split heads. batch_invariant: see ``StateSlots``.
    slots: what running requests start from and leave behind. reads: one buffer for all layers. Raises AdapterError
    naming the tensor that does not fit.
    """

    def __init__(
        self,
        adapter: DeltaMemAdapter,
        names: Collection[str],
        shape: EngineShape,
        rank: int,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        self.spec = adapter.config.spec
        self._adapter, self._names, self._shape, self._rank, self._device = adapter, names, shape, rank, device
        heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        dims = AttentionDims(shape.hidden, heads, kv, kv, shape.hidden)
        self.weights = adapter.layers_for(dict.fromkeys(names, dims), complete=len(shape.pp_spans) == 1)
        order = sorted(adapter.layers, key=layer_order)
        indices = [order.index(name) for name in self.weights]
        every = adapter.scope == "all"
        self.slots = StateSlots(
            indices, self.spec.state_size, shape.max_requests, device, writes=every, batch_invariant=batch_invariant
        )
        self.reads = torch.zeros(shape.max_step_tokens, self.spec.read_width, dtype=torch.float32, device=device)

    def memory(
        self, name: str, heads: int, kv_heads: int, step: Callable[[Tensor, Tensor, Tensor], None], **options: Any
    ) -> DeltaMemory:
        """One layer's memory with this rank's rows. heads, kv_heads: of this rank. The rest: see ``DeltaMemory``."""
        shape, kv = self._shape, kv_heads * self._shape.head_dim
        sizes = (heads * shape.head_dim, kv, kv)
        own = shard(self.weights[name], sizes, self._rank, shape.tp_size).to(self._device, shape.dtype)
        return DeltaMemory(own, sizes, self.reads, step, **options)

    def describe(self, tokens_per_state: int) -> str:
        """Describe the memory in one line, for the log."""
        corrects = "".join(self._adapter.config.delta_heads) or "nothing"
        return (
            f"{len(self.weights)} of {len(self._names)} layers, rank {self.spec.rank}, {self.spec.heads} head(s), "
            f"corrects {corrects}, {tokens_per_state} tokens per stored state, "
            f"adapter {self._adapter.fingerprint[:12]}"
        )


def shard(layer: DeltaMemLayerWeights, sizes: tuple[int, int, int], rank: int, ranks: int) -> DeltaMemLayerWeights:
    """One tensor-parallel rank's rows of Δq, Δk and Δv, which follow the heads; Δo stays whole.

    sizes: widths of this rank's q, k and v.
    """

    def rows(weight: Tensor | None, size: int) -> Tensor | None:
        if weight is None:
            return None
        replicas = max(1, ranks * size // weight.shape[0])  # ranks that hold the same KV heads
        return weight[rank // replicas * size :][:size]

    names = ("delta_q", "delta_k", "delta_v")
    return replace(layer, **{n: rows(getattr(layer, n), s) for n, s in zip(names, sizes, strict=True)})
