"""The decoder layers of a Llama that vLLM has loaded, for calls between two steps (``runtime.worker.own_layers``)."""

from __future__ import annotations

from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel

from mem_triton.config import ConfigError
from mem_triton.runtime.worker.own_layers import LlamaLayers

COMPILED = (
    "mem_triton.memoryllm.pools: rows of M+ are chosen between a layer's norm and its attention, and the model is "
    "compiled as a whole; start with --enforce-eager"
)


def layers_of(model: nn.Module, compiled: bool = False) -> LlamaLayers:
    """A loaded model's layers on this rank. compiled: as one graph. Raises ConfigError for a model that is no Llama."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, LlamaModel):
        raise ConfigError(
            f"layers of {type(model).__name__} cannot be run beside vLLM's batches; LlamaForCausalLM's can"
        )
    return LlamaLayers(
        inner.embed_tokens,
        {index: inner.layers[index] for index in range(inner.start_layer, inner.end_layer)},
        (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
        get_tensor_model_parallel_rank(),
        get_tensor_model_parallel_world_size(),
        tensor_model_parallel_all_reduce,
        COMPILED if compiled else None,
    )
