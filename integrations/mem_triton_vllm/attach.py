"""Attach an adapter to a loaded vLLM model: wrap its projections, add the state caches, declare the op to the compiler.

Runs in every worker, after LoRA has wrapped the projections and before vLLM asks for the KV cache specs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from mem_triton.config import ConfigError, DeltaSection
from mem_triton.delta_mem import AttentionDims
from mem_triton.runtime.sessions import layer_order
from mem_triton.runtime.slots import StateSlots
from mem_triton.runtime.worker.layers import DeltaMemory, served_adapter, shard
from mem_triton_vllm.layers import OutputWithMemory, QKVWithMemory
from mem_triton_vllm.refusals import check_attention
from mem_triton_vllm.state_cache import OP_NAME, DeltaStateCache

logger = init_logger("vllm.mem_triton")

TOKENS_PER_STATE = 16
"""Cells are exact where execution resumes: at the frontier or at a block boundary. 16 costs 0.39 % of Qwen3-4B's KV."""


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every attention module that has ``qkv_proj``, ``attn`` and ``o_proj``."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "attn", None), Attention) and hasattr(module, "qkv_proj"):
            if not hasattr(module, "o_proj"):
                raise ConfigError(f"δ-mem cannot be attached to {name}: it has no o_proj")
            yield name, module


def attach(vllm_config: VllmConfig, model: nn.Module, section: DeltaSection) -> StateSlots:
    """Attach the adapter named in ``section`` to this worker's layers; returns the worker's state tables.

    Raises ConfigError or AdapterError naming what does not fit.
    """
    adapter = served_adapter(section, "vLLM")
    modules = dict(attention_modules(model))
    if not modules:
        raise ConfigError(
            f"δ-mem cannot be attached to {type(model).__name__}: none of its modules has qkv_proj, attn and o_proj"
        )
    whole_model = vllm_config.parallel_config.pipeline_parallel_size == 1
    device = next(model.parameters()).device
    dims = {name: _dims(vllm_config, module) for name, module in modules.items()}
    weights = adapter.layers_for(dims, complete=whole_model)
    _check_uniform(vllm_config)

    order = sorted(adapter.layers, key=layer_order)
    spec, scheduler = adapter.config.spec, vllm_config.scheduler_config
    slots = StateSlots([order.index(name) for name in weights], spec.state_size, scheduler.max_num_seqs, device)
    reads = torch.zeros(scheduler.max_num_batched_tokens, spec.read_width, dtype=torch.float32, device=device)
    tokens_per_state = _tokens_per_state(vllm_config, section)
    fuse = vllm_config.compilation_config.mode != CompilationMode.NONE
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for index, (name, layer) in enumerate(weights.items()):
        module = modules[name]
        cache = DeltaStateCache(
            vllm_config, f"{module.attn.layer_name}.delta_state", spec, tokens_per_state, slots, index
        )
        sizes = _local_sizes(module.attn)
        own = shard(layer, sizes, rank, ranks).to(device, vllm_config.model_config.dtype)
        step = functools.partial(torch.ops.mem_triton.delta_rule_layer, layer_name=cache.layer_name)
        memory = DeltaMemory(own, sizes, reads, step, fuse)
        module.qkv_proj = QKVWithMemory(module.qkv_proj, memory)
        module.o_proj = OutputWithMemory(module.o_proj, memory)
    split_graphs_at_op(vllm_config.compilation_config.splitting_ops)
    logger.info(
        "δ-mem attached: %d of %d layers, rank %d, %d head(s), corrects %s, %d tokens per stored state, adapter %s",
        len(weights), len(modules), spec.rank, spec.heads, "".join(adapter.config.delta_heads) or "nothing",
        tokens_per_state, adapter.fingerprint[:12],
    )  # fmt: skip
    return slots


def split_graphs_at_op(splitting_ops: list[str] | None) -> None:
    """Keep the op between piecewise CUDA graphs, as attention is: it looks at the step's metadata. A list that is empty
    or None means that there are no pieces."""
    if splitting_ops and OP_NAME not in splitting_ops:
        splitting_ops.append(OP_NAME)


def _dims(vllm_config: VllmConfig, module: nn.Module) -> AttentionDims:
    """Unsharded widths of an attention module."""
    model = vllm_config.model_config
    head = module.attn.head_size
    heads, kv_heads = model.model_arch_config.total_num_attention_heads, model.get_total_num_kv_heads()
    hidden = model.get_hidden_size()
    return AttentionDims(hidden, heads * head, kv_heads * head, kv_heads * head, hidden)


def _local_sizes(attention: Attention) -> tuple[int, int, int]:
    """Widths of this rank's q, k and v."""
    kv = attention.num_kv_heads * attention.head_size
    return attention.num_heads * attention.head_size, kv, kv


def _check_uniform(vllm_config: VllmConfig) -> None:
    """One layer with another kind of KV cache moves the states into blocks of their own; refuse such models."""
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        check_attention(name, attention)


def _tokens_per_state(vllm_config: VllmConfig, section: DeltaSection) -> int:
    """16, or 1 under speculative decoding, where a step may resume after any accepted token."""
    speculative, wanted = vllm_config.speculative_config is not None, section.tokens_per_state
    if speculative and wanted not in (None, 1):
        raise ConfigError(
            f"mem_triton.delta.tokens_per_state: {wanted} is wrong under speculative decoding, which resumes after any "
            "accepted token; leave it out, or set it to 1"
        )
    chosen = wanted or (1 if speculative else TOKENS_PER_STATE)
    block_size = vllm_config.cache_config.block_size
    if block_size % chosen:
        raise ConfigError(f"mem_triton.delta.tokens_per_state: {chosen} does not divide --block-size {block_size}")
    return chosen
