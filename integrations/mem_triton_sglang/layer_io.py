"""The decoder layers of a Llama that SGLang has loaded, for calls between steps (``runtime.worker.own_layers``)."""

from __future__ import annotations

from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from sglang.srt.runtime_context import get_parallel
from torch import nn

from mem_triton.config import ConfigError
from mem_triton.runtime.worker.own_layers import LlamaLayers

CAPTURED = (
    "mem_triton.memoryllm.pools: rows of M+ are chosen between a layer's norm and its attention, and prompts run in "
    "CUDA graphs; start with --cuda-graph-backend-prefill disabled"
)


def layers_of(model: nn.Module, captured: bool = False) -> LlamaLayers:
    """A loaded model's layers on this rank. captured: prompts run in CUDA graphs. Raises ConfigError for others than
    Llama."""
    inner, parallel = getattr(model, "model", None), get_parallel()
    if not isinstance(inner, LlamaModel):
        raise ConfigError(
            f"layers of {type(model).__name__} cannot be run beside SGLang's batches; LlamaForCausalLM's can"
        )
    return LlamaLayers(
        inner.embed_tokens,
        {index: inner.layers[index] for index in range(inner.start_layer, inner.end_layer)},
        (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
        parallel.tp_rank,
        parallel.tp_size,
        tensor_model_parallel_all_reduce,
        CAPTURED if captured else None,
    )
