"""Reads vLLM's configuration as memory needs it."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices

from mem_triton.systems.engine import EngineShape


def shape_of(vllm_config: VllmConfig) -> EngineShape:
    """The same in the front end and in every worker."""
    model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
    layers, stages = model.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    return EngineShape(
        engine="vLLM",
        model=model.model,
        revision=model.revision,
        hf_config=model.hf_text_config.to_dict(),
        dtype=model.dtype,
        hidden=model.get_hidden_size(),
        heads=model.model_arch_config.total_num_attention_heads,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        tp_size=parallel.tensor_parallel_size,
        pp_spans=tuple(get_pp_indices(layers, stage, stages) for stage in range(stages)),
        max_requests=scheduler.max_num_seqs,
        max_step_tokens=scheduler.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        quantization=model.quantization,
        splits_prompts="--no-enable-chunked-prefill" if scheduler.enable_chunked_prefill else None,
    )
