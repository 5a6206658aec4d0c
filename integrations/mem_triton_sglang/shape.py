"""Reads SGLang's configuration as memory needs it."""

from __future__ import annotations

from typing import Any

from mem_triton.systems.engine import EngineShape


def shape_of(server_args: Any, model_config: Any) -> EngineShape:
    """The same in the front end and in every worker. server_args: resolved; model_config: SGLang's ``ModelConfig``."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.distributed.utils import get_pp_indices

    cfg = resolved_view(server_args)
    layers, stages = model_config.num_hidden_layers, cfg.pp_size
    chunk = cfg.chunked_prefill_size or 0
    longest_step = max(chunk, cfg.max_prefill_tokens) + (0 if chunk > 0 else model_config.context_len)
    graphs = cfg.cuda_graph_config.decode.bs if cfg.cuda_graph_config is not None else None
    return EngineShape(
        engine="SGLang",
        model=cfg.model_path,
        revision=cfg.revision,
        hf_config=model_config.hf_text_config.to_dict(),
        dtype=model_config.dtype,
        hidden=model_config.hidden_size,
        heads=model_config.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.head_dim,
        tp_size=cfg.tp_size,
        pp_spans=tuple(get_pp_indices(layers, stage, stages) for stage in range(stages)),
        max_requests=max([cfg.max_running_requests, *(graphs or ())]),  # a captured batch may be padded beyond it
        max_step_tokens=longest_step,
        max_model_len=model_config.context_len,
        quantization=model_config.quantization,
        splits_prompts="--chunked-prefill-size -1" if chunk > 0 else None,
    )
