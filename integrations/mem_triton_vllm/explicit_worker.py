"""Explicit memory in vLLM's worker: its attention layers, and where a request's own keys and values lie.

Runs in every worker before vLLM profiles memory, so that the pool is accounted for and the KV cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from mem_triton.config import ConfigError, MemorySection
from mem_triton.ops.memory_attention import Policy
from mem_triton.systems.explicit.worker import ExplicitMemory
from mem_triton_vllm.backend import MemoryAttentionBackend
from mem_triton_vllm.refusals import check_attention
from mem_triton_vllm.shape import shape_of

logger = init_logger("vllm.mem_triton")

BlockRow = Callable[[str], Tensor]
"""A request id's row of the engine's block table."""


def attach_explicit(
    vllm_config: VllmConfig, model: nn.Module, section: MemorySection, block_row: BlockRow,
    lose: Callable[[BaseException], None], policy: Policy | None = None,
) -> ExplicitMemory:  # fmt: skip
    """Give this worker's attention layers the bank. policy: of all of them, see ``backend.MemoryAttentionImpl``.

    lose: told of an exception in a layer's attention, whose requests lose their memory then.
    Raises ConfigError for what memory cannot serve.
    """
    attentions = _attentions(vllm_config)

    def read_context(request_id: str, index: int, tokens: int) -> tuple[Tensor, Tensor]:
        cache = attentions[index].kv_cache  # [blocks, Hkv, N, 2D]
        blocks = block_row(request_id)[: -(-tokens // cache.shape[2])].to(cache.device, torch.int64)
        kept = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]  # [Hkv, tokens, 2D], copied by the indexing
        return kept.chunk(2, dim=-1)

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    device = next(model.parameters()).device
    memory = ExplicitMemory(
        shape_of(vllm_config), section, list(attentions), get_tensor_model_parallel_rank(), rank, device, read_context
    )
    for index, attention in attentions.items():
        attention.mem_triton_memory = memory.layer(index)
        attention.impl.policy, attention.impl.lose = policy, lose
    logger.info("explicit memory attached: %s", memory.describe())
    return memory


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
