"""Attach an adapter to a loaded vLLM model: wrap its projections, add the state caches, declare the op to the compiler.

Runs in every worker, after LoRA has wrapped the projections and before vLLM asks for the KV cache specs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from mem_triton.config import ConfigError
from mem_triton.runtime.worker.modules import attention_modules
from mem_triton.systems.delta_mem.adapter import DeltaMemAdapter
from mem_triton.systems.delta_mem.attach import DeltaLayers
from mem_triton.systems.delta_mem.layer_memory import Linear, plain_linear
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton_vllm import fused_inputs
from mem_triton_vllm.layers import OutputWithMemory, QKVWithMemory
from mem_triton_vllm.refusals import check_attention
from mem_triton_vllm.shape import shape_of
from mem_triton_vllm.state_cache import OP_NAMES, DeltaStateCache, Lose

logger = init_logger("vllm.mem_triton")

TOKENS_PER_STATE = 16
"""Cells are exact where execution resumes: at the frontier or at a block boundary. 16 costs 0.39 % of Qwen3-4B's KV."""


def attach(
    vllm_config: VllmConfig,
    model: nn.Module,
    adapter: DeltaMemAdapter,
    tokens_per_state: int | None,
    lose: Lose,
    batch_invariant: bool = False,
) -> StateSlots:
    """Attach an adapter to this worker's layers; returns the worker's state tables.

    tokens_per_state: as configured. lose: told of an exception in a layer's step, whose requests lose their memory
    then. Raises ConfigError or AdapterError naming what does not fit.
    """
    modules = attention_modules(model, Attention, "δ-mem")
    device = next(model.parameters()).device
    rank = get_tensor_model_parallel_rank()
    layers = DeltaLayers(adapter, modules, shape_of(vllm_config), rank, device, batch_invariant)
    _check_uniform(vllm_config)

    tokens_per_state = _tokens_per_state(vllm_config, tokens_per_state)
    fuse = vllm_config.compilation_config.mode != CompilationMode.NONE
    linear = cpu_linear if device.type == "cpu" else plain_linear
    how = "no layer of it is on this rank"
    for index, name in enumerate(layers.weights):
        module = modules[name]
        layer_name = f"{module.attn.layer_name}.delta_state"
        step = functools.partial(torch.ops.mem_triton.delta_rule_layer, layer_name=layer_name)
        memory = layers.memory(name, module.attn.num_heads, module.attn.num_kv_heads, step, fuse=fuse, linear=linear)
        obstacle = fused_inputs.obstacle(module, device, adapter.scope)
        inputs = None if obstacle else fused_inputs.head_inputs(module, memory)
        DeltaStateCache(vllm_config, layer_name, layers.spec, tokens_per_state, layers.slots, index, lose, inputs)
        if obstacle:
            module.qkv_proj = QKVWithMemory(module.qkv_proj, memory)
            how = f"the model's own norm and RoPE, as {obstacle}"
        else:
            prepare = functools.partial(
                torch.ops.mem_triton.attention_inputs_layer, gate_bias=memory.gate_bias, layer_name=layer_name
            )
            how = fused_inputs.install(module, memory, prepare)
        module.o_proj = OutputWithMemory(module.o_proj, memory)
    split_graphs_at_ops(vllm_config.compilation_config.splitting_ops)
    logger.info("δ-mem attached: %s; %s", layers.describe(tokens_per_state), how)
    return layers.slots


def cpu_linear(weight: Tensor) -> Linear:
    """vLLM's own matmul for CPUs, which packs the weight once: at a few rows it takes half of torch's time."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    return lambda x: holder.cpu_linear(x, holder.weight, None)


def split_graphs_at_ops(splitting_ops: list[str] | None) -> None:
    """Keep our ops between piecewise CUDA graphs, as attention is: they look at the step's metadata. An empty list, or
    None, means that there are no pieces."""
    if splitting_ops:
        splitting_ops += [name for name in OP_NAMES if name not in splitting_ops]


def _check_uniform(vllm_config: VllmConfig) -> None:
    """One layer with another kind of KV cache moves the states into blocks of their own; refuse such models."""
    for name, attention in get_layers_from_vllm_config(vllm_config, Attention).items():
        check_attention(name, attention)


def _tokens_per_state(vllm_config: VllmConfig, wanted: int | None) -> int:
    """16, or 1 under speculative decoding, where a step may resume after any accepted token."""
    speculative = vllm_config.speculative_config is not None
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
