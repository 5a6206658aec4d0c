"""Explicit memory in a worker: the pool of pages, the bank's constant prefix, the tables, the loader, the captures.

Runs in every worker before vLLM profiles memory, so that the pool is accounted for and the KV cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from mem_triton.config import ConfigError, MemorySection
from mem_triton.ops.memory_attention import SharedSegment
from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config
from mem_triton.runtime.tables import MemoryTables
from mem_triton.store.bank import Bank
from mem_triton.store.block import MemoryBlock
from mem_triton.store.loader import PageLoader
from mem_triton.store.placement import place, place_sink
from mem_triton.store.pool import PagePool
from mem_triton_vllm.backend import LayerMemory, MemoryAttentionBackend
from mem_triton_vllm.capture import BlockRow, Captures
from mem_triton_vllm.explicit_layout import GIB, layout_of
from mem_triton_vllm.refusals import check_attention

logger = init_logger("vllm.mem_triton")


class ExplicitMemory:
    """tables: who sees what. pool: its layers are those of the bank that this rank has. loader: fills pages.

    block_row: reads a running request's row of the engine's block table, for captures.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, section: MemorySection, block_row: BlockRow) -> None:
        self.bank = Bank.open(section.bank)
        spec = self.bank.spec
        layout = layout_of(vllm_config, section, spec)
        attentions = _attentions(vllm_config)
        config = vllm_config.model_config.hf_text_config.to_dict()
        ropes = {index: rope_from_config(config, index) for index in attentions}
        device = next(model.parameters()).device
        first_head, heads = _heads(spec.kv_heads, layout.kv_heads)
        layers = [index for index in spec.layers if index in attentions]

        self.tables = MemoryTables(
            vllm_config.scheduler_config.max_num_seqs, layout.max_pages, layout.page_tokens, device
        )
        self.pool = PagePool(
            len(layers), layout.kv_heads, layout.head_dim, layout.page_tokens, layout.num_pages, layout.dtype, device
        )
        own_ropes = [ropes[index] for index in layers]

        def read(ref: str) -> Any:
            return place(self.bank.load(ref, layers=layers, heads=heads), own_ropes, spec.kind, spec.reference_tokens)

        self.loader = PageLoader(self.pool, read, host_bytes=int(section.host_gib * GIB))
        sinks = self._sinks(attentions, ropes, heads, vllm_config.model_config.dtype, device)
        for index, attention in attentions.items():
            pages = self.pool.layer(layers.index(index)) if index in layers else None
            if pages is not None or index in sinks:
                attention.mem_triton_memory = LayerMemory(self.tables, pages, sinks.get(index))
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        ordered = [(index, attentions[index], ropes[index]) for index in layers]
        self.captures = Captures(ordered, first_head, rank, block_row)
        logger.info(
            "explicit memory attached: bank %s (%s), %d of %d layers, %d pages of %d tokens (%.2f GiB), %s",
            section.bank, spec.kind, len(layers), len(attentions), layout.num_pages, layout.page_tokens,
            self.pool.nbytes / GIB, layout.dtype,
        )  # fmt: skip

    def _sinks(
        self,
        attentions: Mapping[int, Any],
        ropes: Mapping[int, RotaryEmbedding],
        heads: slice,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[int, SharedSegment]:
        """The bank's constant prefix by layer, at its place before all references; empty if the bank has none."""
        block = self.bank.sink()
        if block is None:
            return {}
        indices = sorted(attentions)  # the sink is stored for all layers of the model
        own = MemoryBlock(*(tensor[indices][:, heads] for tensor in (block.keys, block.values, block.positions)))
        placed = place_sink(own, [ropes[index] for index in indices], self.bank.spec.reference_tokens)
        first, end = self.tables.sink_first, self.tables.sink_end
        return {
            index: SharedSegment(placed.keys[i].to(device, dtype), placed.values[i].to(device, dtype), first, end)
            for i, index in enumerate(indices)
        }

    def enter(self, request_id: str, carried: Mapping[str, Any] | None) -> None:
        """A request joins the batch."""
        self.tables.enter(request_id, carried)
        self.captures.enter(request_id, carried)

    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch."""
        self.tables.leave(request_id)
        self.captures.leave(request_id)

    def set_rows(self, request_ids: Sequence[str], first: Sequence[int], last: Sequence[int]) -> None:
        """The coming step's batch, and the positions that it processes."""
        self.tables.set_rows(request_ids, first, last)
        self.captures.set_rows(request_ids, last)
        self.loader.before_step()


def _attentions(vllm_config: VllmConfig) -> dict[int, Any]:
    """This rank's attention layers by their index in the model. Raises ConfigError for what memory cannot serve."""
    attentions = {}
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        check_attention(name, attention, "explicit memory")
        if attention.attn_backend is not MemoryAttentionBackend:
            raise ConfigError(
                f"explicit memory cannot be attached to {name}: vLLM gave it the backend "
                f"{attention.attn_backend.get_name()}; leave --attention-backend and its settings per kind out"
            )
        attentions[extract_layer_index(name)] = attention
    if not attentions:
        raise ConfigError("explicit memory cannot be attached: the model has no attention layers")
    return attentions


def _heads(total: int, here: int) -> tuple[int, slice]:
    """This rank's KV heads: (first, slice). Ranks beyond the number of heads repeat them, as vLLM does."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * here if ranks <= total else rank * total // ranks
    return first, slice(first, first + here)
