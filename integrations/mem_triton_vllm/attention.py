"""vLLM's attention layers: what they read besides their context, and where a request's own keys and values lie.

Runs in every worker before vLLM profiles memory, so that pools are accounted for and the KV cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention import Policy
from mem_triton.ops.memory_attention.arguments.packing import unpack_keys, unpack_values
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton_vllm.backend import add_to
from mem_triton_vllm.refusals import check_attention

BlockRow = Callable[[str], Tensor]
"""A request id's row of the engine's block table."""


def attentions_of(vllm_config: VllmConfig) -> dict[int, Any]:
    """This rank's attention layers by their index in the model, able to read memory from now on.

    Raises ConfigError for what memory cannot serve.
    """
    attentions, model = {}, vllm_config.model_config
    if model.is_mm_prefix_lm or vllm_config.attention_config.use_non_causal:
        raise ConfigError("memory in attention is defined for causal attention, and this model looks ahead in places")
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        check_attention(name, attention, "memory in attention")
        add_to(name, attention)
        attentions[extract_layer_index(name)] = attention
    if not attentions:
        raise ConfigError("memory in attention cannot be attached: the model has no attention layers")
    return attentions


def connect(attentions: Mapping[int, Any], memory: BatchMemory, policy: Policy | None) -> None:
    """Give each layer what it reads. policy: of all of them, see ``backend.AttentionWithMemory``."""
    for index, attention in attentions.items():
        attention.impl.mem_connect(memory, memory.segments(index), policy)


def read_context(
    attentions: Mapping[int, Any], block_row: BlockRow, request_id: str, index: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Copies of a running request's keys, with their rotation, and values in one layer: [Hkv, tokens, D]."""
    attention = attentions[index]
    cache, layout = attention.kv_cache, attention.impl.mem_layout  # [blocks, Hkv, N, 2D]
    blocks = block_row(request_id)[: -(-tokens // cache.shape[2])].to(cache.device, torch.int64)
    keys, values = layout.split(cache)
    keys, values = keys[blocks], values[blocks]  # copies
    if layout.packing is not None:
        keys, values = unpack_keys(keys, layout.packing), unpack_values(values, layout.packing)
    return tuple(x.transpose(0, 1).flatten(1, 2)[:, :tokens] for x in (keys, values))
