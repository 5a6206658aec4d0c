"""Keeps δ-mem's states in a side cache of vLLM's attention KV group, and defines the op that reads and writes them.

Why here: vLLM puts every full-attention spec of equal block size into one group with one block table. A state cell that
belongs to a KV block is therefore shared, copied, evicted and reloaded together with it, so prefix caching, preemption,
slot moves and tensor parallelism need no bookkeeping of ours (vLLM's own indexer caches use the same mechanism).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from mem_triton.ops.attention_inputs import HeadInputs, attention_inputs
from mem_triton.ops.delta_rule import DeltaRuleSpec, StateBatch, delta_rule_paged
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton_vllm.kv_spec import DeltaStateSpec

SCHEMAS = {
    "delta_rule_layer": "(Tensor projections, Tensor gate_bias, Tensor(a2!) reads, str layer_name) -> ()",
    "attention_inputs_layer": (
        "(Tensor(a0!) projected, Tensor? projections, Tensor(a2!) reads, Tensor gate_bias, str layer_name) -> ()"
    ),
}
"""Ops of this module. Written out: what torch infers from a function depends on how vLLM has wrapped it."""
Lose = Callable[[BaseException], None]
"""Told of an exception in a layer: the requests of the step that runs lose their memory."""
OP_NAMES = tuple(f"mem_triton::{name}" for name in SCHEMAS)


@dataclass
class DeltaStateMetadata:
    """What one step's kernels need of the batch; device tensors except max_query_len."""

    query_start_loc: Tensor  # [rows + 1] int32
    seq_lens: Tensor  # [rows] int32, length after this step
    block_table: Tensor  # [rows, max_blocks] int32
    max_query_len: int


class DeltaStateMetadataBuilder(AttentionMetadataBuilder[DeltaStateMetadata]):
    """Passes the common metadata on. Nothing is computed on the host, so every CUDA graph mode is supported."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeltaStateMetadata:
        m = common_attn_metadata
        return DeltaStateMetadata(m.query_start_loc, m.seq_lens, m.block_table_tensor, m.max_query_len)


class DeltaStateBackend(AttentionBackend):
    """Backend of the storage-only layer; it has a metadata builder and no attention implementation."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "MEM_TRITON_DELTA_STATE"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("DeltaStateCache stores states; it computes no attention")

    @staticmethod
    def get_builder_cls() -> type[DeltaStateMetadataBuilder]:
        return DeltaStateMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        tokens = kv_cache_spec.tokens_per_state if kv_cache_spec is not None else 1
        return [MultipleOf(int(tokens))]


class DeltaStateCache(nn.Module, AttentionLayerBase):
    """One decoder layer's states: a cell of H*r*r floats for every ``tokens_per_state`` tokens of a KV block.

    Cell (block, i) holds the state after the last processed token of that span. ``slots`` is shared by all layers of
    the worker; ``index`` is this layer's place in it. ``inputs`` is what ``prepare`` does to the layer's heads, None
    where the model's own norm and RoPE do it. vLLM's compilation context keeps the layer, by its name.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        layer_name: str,
        spec: DeltaRuleSpec,
        tokens_per_state: int,
        slots: StateSlots,
        index: int,
        lose: Lose,
        inputs: HeadInputs | None = None,
    ) -> None:
        super().__init__()
        self.lose, self.inputs = lose, inputs
        self.layer_name, self.spec, self.tokens_per_state = layer_name, spec, tokens_per_state
        self.slots, self.index = slots, index
        self.kv_cache = torch.tensor([])
        layers = vllm_config.compilation_config.static_forward_context
        if layer_name in layers:
            raise ValueError(f"{layer_name} exists already: was the adapter attached twice?")
        # Before the attention layers: vLLM's scheduler picks a group's block manager by the group's first spec,
        # and it must be the one that knows about states (kv_spec.py).
        others = dict(layers)
        layers.clear()
        layers.update({layer_name: self, **others})

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DeltaStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> DeltaStateSpec:
        size = self.spec.state_size
        return DeltaStateSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=size // 2,
            head_size_v=size - size // 2,
            dtype=torch.float32,
            tokens_per_state=self.tokens_per_state,
            max_tp_shards=1,  # every tensor-parallel rank holds the whole state
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache  # [blocks, 1, cells, H*r*r]

    def step(self, projections: Tensor, gate_bias: Tensor, reads: Tensor, metadata: DeltaStateMetadata) -> None:
        """Read and update the states of all rows. projections: [tokens, P]; reads: fp32 [>= tokens, H*r], written."""
        delta_rule_paged(
            projections,
            reads,
            self._batch(gate_bias, metadata),
            self.spec,
            **self._layout(),
            max_query_len=metadata.max_query_len,
            batch_invariant=self.slots.batch_invariant,
        )

    def prepare(
        self, qkv: Tensor, projections: Tensor, gate_bias: Tensor, reads: Tensor, metadata: DeltaStateMetadata
    ) -> None:
        """``step``, and q | k | v of the tokens as attention takes them, in place."""
        attention_inputs(
            qkv,
            projections,
            reads,
            self.inputs,
            self._batch(gate_bias, metadata),
            self.spec,
            **self._layout(),
            max_query_len=metadata.max_query_len,
            batch_invariant=self.slots.batch_invariant,
        )

    def _batch(self, gate_bias: Tensor, m: DeltaStateMetadata) -> StateBatch:
        slots, rows = self.slots, m.seq_lens.shape[0]
        return StateBatch(
            gate_bias,
            self.kv_cache.squeeze(1),
            m.block_table,
            m.query_start_loc,
            m.seq_lens,
            slots.initial[self.index],
            slots.row_slot[:rows],
            slots.row_write[:rows],
            slots.last[self.index],
        )

    def _layout(self) -> dict[str, int]:
        cells = self.kv_cache.shape[2]
        return {"block_size": cells * self.tokens_per_state, "tokens_per_state": self.tokens_per_state}


def _metadata_of(layer_name: str) -> tuple[DeltaStateCache, DeltaStateMetadata] | None:
    """A layer and its step; None in vLLM's memory profiling run, before there is a KV cache."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if metadata is None:
        return None
    metadata = metadata[layer_name] if isinstance(metadata, dict) else metadata[0][layer_name]
    return context.no_compile_layers[layer_name], metadata


def _delta_rule_layer(projections: Tensor, gate_bias: Tensor, reads: Tensor, layer_name: str) -> None:
    found = _metadata_of(layer_name)
    if found is None:
        reads.zero_()
        return
    layer, metadata = found
    try:
        layer.step(projections, gate_bias, reads, metadata)
    except Exception as error:
        reads.zero_()
        layer.lose(error)


def _attention_inputs_layer(
    projected: Tensor, projections: Tensor | None, reads: Tensor, gate_bias: Tensor, layer_name: str
) -> None:
    """projections: None = the columns of ``projected`` behind q | k | v."""
    found = _metadata_of(layer_name)
    if found is None:
        reads.zero_()
        return
    layer, metadata = found
    width = layer.inputs.width
    if projections is None:
        projections = projected[:, width : width + layer.spec.projection_width]
    try:
        layer.prepare(projected[:, :width], projections, gate_bias, reads, metadata)
    except Exception as error:
        reads.zero_()
        layer.lose(error)


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
for (_name, _schema), _function in zip(SCHEMAS.items(), (_delta_rule_layer, _attention_inputs_layer), strict=True):
    _LIBRARY.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, eager_break_during_capture(_function), _device)
    torch.library.register_fake(f"mem_triton::{_name}", lambda *args, **kwargs: None, lib=_LIBRARY)
