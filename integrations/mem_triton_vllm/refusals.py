"""What this integration does not serve, and the parts of vLLM that it leans on: both are checked before any request.

Every refusal says why and what to change. ``check_touch_points`` names each internal seam, so that a vLLM release that
moves one fails at start-up with a sentence instead of in a request with a stack trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, require
from mem_triton.config import ConfigError, MemTritonConfig, parse_config
from mem_triton.systems import registry
from mem_triton.systems.base import Capability
from mem_triton_vllm.names import LOAD_FORMAT

SECTION = "mem_triton"


def section_of(vllm_config: VllmConfig) -> MemTritonConfig | None:
    """The checked ``mem_triton`` section of ``--additional-config``, or None if memory is not asked for.

    Raises ConfigError if the section and ``--load-format mem_triton`` do not come together.
    """
    additional = vllm_config.additional_config
    section = additional.get(SECTION) if isinstance(additional, dict) else None
    flagged = vllm_config.load_config.load_format == LOAD_FORMAT
    if section is None and not flagged:
        return None
    if section is None:
        raise ConfigError(
            "--load-format mem_triton needs its section in --additional-config, for example "
            '\'{"mem_triton": {"delta": {"adapter": "PATH_OR_HUGGING_FACE_ID"}}}\' or '
            '\'{"mem_triton": {"memory": {"bank": "FOLDER"}}}\''
        )
    config = parse_config(section)
    if not flagged:
        raise ConfigError(
            "--additional-config has a mem_triton section, but the model is not loaded through it: "
            "add --load-format mem_triton (a load format of your own goes into --model-loader-extra-config "
            "'{\"base_load_format\": ...}')"
        )
    if not config.systems:
        known = ", ".join(registry.systems())
        raise ConfigError(f"mem_triton: no memory is configured; give it one or more of {known}, or drop the flags")
    return config


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse engine options under which memory would be wrong. Raises ConfigError that says why."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    kinds = {
        "multi-head latent attention (MLA)": (model.use_mla, "it has no keys and values by head"),
        "hybrid or attention-free models": (
            model.is_hybrid or model.is_attention_free,
            "their KV blocks are not uniform, and their states know nothing of memory",
        ),
        "encoder-decoder models": (model.is_encoder_decoder, "memory is defined for decoders"),
        "pooling models": (model.runner_type != "generate", "they do not generate"),
        "decode context parallelism (--decode-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1,
            "it spreads one sequence over ranks, and memory belongs to the whole sequence",
        ),
        "prefill context parallelism": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "it spreads one sequence over ranks, and memory belongs to the whole sequence",
        ),
        "dual batch overlap (--enable-dbo)": (
            getattr(parallel, "enable_dbo", False),
            "its two half batches would share one set of tables",
        ),
    }
    for name, (present, why) in kinds.items():
        if present:
            raise ConfigError(f"mem_triton does not support {name}: {why}")
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ConfigError(
            "mem_triton does not support vLLM's Rust front end: it takes requests past memory's own and would ignore "
            "their fields; unset VLLM_USE_RUST_FRONTEND"
        )
    if not vllm_config.use_v2_model_runner and vllm_config.device_config.device_type != "cpu":
        raise ConfigError("mem_triton on a GPU needs vLLM's Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER=0")


def session_obstacle(vllm_config: VllmConfig) -> str | None:
    """Why this engine, as it is configured, cannot have sessions; None if it can."""
    if option := _several_front_ends(vllm_config):
        return f"sessions need {option} 1: each front end would keep versions of its own"
    if vllm_config.speculative_config is not None:
        return "sessions do not work with speculative decoding: a rejected draft would be committed"
    if vllm_config.model_config.enable_prompt_embeds:
        return "sessions do not work with --enable-prompt-embeds: such prompts have no tokens to count"
    return None


def obstacles(vllm_config: VllmConfig) -> dict[Capability, str]:
    """Why requests of this engine, as it is configured, cannot use a capability."""
    found = {Capability.STATE: session_obstacle(vllm_config), Capability.SEGMENTS: segment_obstacle(vllm_config)}
    return {capability: why for capability, why in found.items() if why is not None}


def segment_obstacle(vllm_config: VllmConfig) -> str | None:
    """Why requests of this engine, as it is configured, cannot read memory in attention; None if they can."""
    if option := _several_front_ends(vllm_config):
        return f"memory in attention needs {option} 1: one front end decides what lies in the pool"
    return None


def has_one_front_end(vllm_config: VllmConfig) -> bool:
    """Whether requests of this engine can have memory at all that its workers are asked for."""
    return _several_front_ends(vllm_config) is None


def _several_front_ends(vllm_config: VllmConfig) -> str | None:
    """The option that gives this engine more than one front end; None if it has one."""
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        return "--data-parallel-size"
    return "--api-server-count" if getattr(parallel, "_api_process_count", 1) > 1 else None


def check_attention(name: str, attention: Attention, what: str = "δ-mem") -> None:
    """Refuse attention layers whose KV blocks are not plain full attention. Raises ConfigError naming the layer."""
    reason = None
    if getattr(attention, "sliding_window", None) is not None:
        reason = (
            "has a sliding window, beyond which a memory would have no place; "
            "serve the model with --disable-sliding-window if its quality allows"
        )
    elif getattr(attention, "kv_sharing_target_layer_name", None):
        reason = "shares another layer's KV cache, so it has no blocks of its own"
    elif getattr(attention, "attn_type", "decoder") != "decoder":
        reason = f"is {attention.attn_type} attention; memory is defined for causal decoders"
    if reason:
        raise ConfigError(f"{what} cannot be attached to {name}: the layer {reason}")


def _has(path: str, *attributes: str) -> bool:
    module, _, name = path.partition(":")
    target = getattr(import_module(module), name)
    return all(
        hasattr(target, attribute) or attribute in getattr(target, "__annotations__", {}) for attribute in attributes
    )


def _takes(path: str, *parameters: str) -> bool:
    module, _, name = path.partition(":")
    target = import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return set(parameters) <= set(inspect.signature(target).parameters)


def _registered(path: str) -> bool:
    module, _, name = path.partition(":")
    ops = [op.partition("::") for op in getattr(import_module(module), name)]
    return all(hasattr(getattr(torch.ops, namespace), op) for namespace, _, op in ops)


TOUCH_POINTS: dict[str, Callable[[], bool]] = {
    "register_model_loader": lambda: _takes("vllm.model_executor.model_loader:register_model_loader", "load_format"),
    "AsyncLLM.generate": lambda: _takes("vllm.v1.engine.async_llm:AsyncLLM.generate", "prompt", "sampling_params"),
    "AsyncLLM.collective_rpc": lambda: _takes("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", "method", "args"),
    "sleep": lambda: (
        _takes("vllm.v1.engine.async_llm:AsyncLLM.sleep", "level")
        and _takes("vllm.v1.engine.llm_engine:LLMEngine.sleep", "level")
    ),
    "LLMEngine.add_request": lambda: _takes("vllm.v1.engine.llm_engine:LLMEngine.add_request", "prompt", "params"),
    "LLMEngine.step": lambda: _has("vllm.v1.engine.llm_engine:LLMEngine", "step", "abort_request", "collective_rpc"),
    "SamplingParams": lambda: _has("vllm.sampling_params:SamplingParams", "__struct_fields__", "detokenize", "n"),
    "VLLM_USE_RUST_FRONTEND": lambda: "VLLM_USE_RUST_FRONTEND" in import_module("vllm.envs").environment_variables,
    "init_entrypoints_middleware": lambda: _takes(
        "vllm.entrypoints.launchers.app:init_entrypoints_middleware", "args", "app"
    ),
    "load_lora_adapter": lambda: _takes(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter", "request"
    ),
    "run_request": lambda: _takes("vllm.entrypoints.launchers.run_batch:run_request", "serving_engine_func", "request"),
    "parse_model_prompt": lambda: _takes(
        "vllm.renderers.inputs.preprocess:parse_model_prompt", "model_config", "prompt"
    ),
    "render_cmpl": lambda: _takes("vllm.renderers.base:BaseRenderer.render_cmpl", "prompts", "tok_params"),
    "IncrementalDetokenizer": lambda: (
        _takes("vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request", "tokenizer", "request")
        and _takes("vllm.v1.engine.detokenizer:IncrementalDetokenizer.get_next_output_text", "finished", "delta")
    ),
    "LogprobsProcessor": lambda: _has("vllm.v1.engine.logprobs:LogprobsProcessor", "_verify_tokens"),
    "SamplingParams.extra_args": lambda: _takes("vllm.sampling_params:SamplingParams.from_optional", "extra_args"),
    "NewRequestData.sampling_params": lambda: _has("vllm.v1.core.sched.output:NewRequestData", "sampling_params"),
    "WorkerBase": lambda: _has("vllm.v1.worker.worker_base:WorkerBase", "get_model"),
    "ModelState": lambda: _has(
        "vllm.v1.worker.gpu.model_states.interface:ModelState", "add_request", "remove_request", "prepare_attn"
    ),
    "resolve_model_state_cls": lambda: _takes(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls", "vllm_config", "model"
    ),
    "GPUModelRunner": lambda: _has(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "_update_states", "get_kv_cache_spec"
    ),
    "FullAttentionSpec.tokens_per_state": lambda: _takes(
        "vllm.v1.kv_cache_interface:FullAttentionSpec", "tokens_per_state", "max_tp_shards"
    ),
    "UniformTypeKVCacheSpecs": lambda: _has("vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs", "from_specs"),
    "splitting_ops": lambda: _has("vllm.config:CompilationConfig", "splitting_ops", "static_forward_context"),
    "generate_block_hash_extra_keys": lambda: _takes(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys", "request", "start_token_idx", "end_token_idx"
    ),
    "Scheduler": lambda: (
        _has(
            "vllm.v1.core.sched.scheduler:Scheduler",
            "add_request",
            "schedule",
            "reset_prefix_cache",
            "_free_blocks",
            "_free_request_blocks",
        )
        and _has("vllm.v1.core.sched.request_queue:RequestQueue", "prepend_request", "remove_request")
        and "max_num_active_reqs" in inspect.getsource(import_module("vllm.v1.core.sched.scheduler"))
    ),
    "AttentionImpl": lambda: _takes(
        "vllm.v1.attention.backend:AttentionImpl.forward", "layer", "query", "kv_cache", "attn_metadata", "output"
    ),
    "AttentionMetadataBuilder": lambda: _takes(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build", "common_prefix_len", "common_attn_metadata"
    ),
    "CommonAttentionMetadata": lambda: _has(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "num_actual_tokens",
        "max_query_len",
        "query_start_loc",
        "seq_lens",
        "block_table_tensor",
    ),
    "cudagraph_runtime_mode": lambda: _has("vllm.forward_context:ForwardContext", "cudagraph_runtime_mode"),
    "RequestOutput.kv_transfer_params": lambda: _takes("vllm.outputs:RequestOutput", "kv_transfer_params"),
    "eager_break_during_capture": lambda: _takes(
        "vllm.compilation.breakable_cudagraph:eager_break_during_capture", "fn"
    ),
    "op registration": lambda: _registered("mem_triton_vllm.state_cache:OP_NAMES"),
    "block hash of cache_salt": lambda: (
        "cache_salt" in inspect.getsource(import_module("vllm.v1.core.kv_cache_utils").generate_block_hash_extra_keys)
    ),
}
"""Each internal seam of vLLM that this integration uses, with a check that it is still there."""


def check_touch_points(points: dict[str, Callable[[], bool]] = TOUCH_POINTS) -> None:
    """Raise UnsupportedVersionError naming the seams that this vLLM lacks, and the supported range."""
    version = require("vllm")
    missing = []
    for name, present in points.items():
        try:
            if not present():
                missing.append(name)
        except Exception:  # whatever a moved seam raises when it is looked for
            missing.append(name)
    if missing:
        raise UnsupportedVersionError(
            f"vLLM {version} lacks what mem_triton builds on: {', '.join(missing)}. "
            f"Supported: vllm{TESTED_VERSIONS['vllm']}"
        )
