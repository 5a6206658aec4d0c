"""Attach an adapter to a model that SGLang has loaded: hooks on its projections, tables for its requests.

Runs in every scheduler process, after LoRA has wrapped the projections and before the KV cache is sized. The model's
classes, parameters and their names stay as they are, so weights can still be updated while serving.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from mem_triton.config import ConfigError, DeltaSection
from mem_triton.delta_mem import AttentionDims
from mem_triton.runtime.engine_shape import EngineShape
from mem_triton.runtime.sessions import layer_order
from mem_triton.runtime.slots import StateSlots
from mem_triton.runtime.worker.layers import DeltaMemory, served_adapter, shard
from mem_triton_sglang.states import DeltaStates

logger = logging.getLogger("sglang.mem_triton")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every attention module that has ``qkv_proj``, ``attn`` and ``o_proj``."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "attn", None), RadixAttention) and hasattr(module, "qkv_proj"):
            if not hasattr(module, "o_proj"):
                raise ConfigError(f"δ-mem cannot be attached to {name}: it has no o_proj")
            yield name, module


def check_attention(name: str, attention: RadixAttention, what: str) -> None:
    """Refuse layers that are not plain causal attention over all context. Raises ConfigError naming the layer."""
    window = attention.sliding_window_size
    reason = None
    if window is not None and window > -1:
        reason = "has a sliding window, beyond which a memory would have no place"
    elif attention.is_cross_attention or attention.attn_type != AttentionType.DECODER:
        reason = "is not causal self-attention; memory is defined for decoders"
    elif attention.qk_head_dim != attention.v_head_dim:
        reason = "has keys and values of different widths"
    if reason:
        raise ConfigError(f"{what} cannot be attached to {name}: the layer {reason}")


def attach(model: nn.Module, shape: EngineShape, section: DeltaSection, page_size: int) -> DeltaStates:
    """Attach the adapter named in ``section`` to this rank's layers; returns their states, not allocated yet.

    Raises ConfigError or AdapterError naming what does not fit.
    """
    adapter = served_adapter(section, "SGLang")
    if section.tokens_per_state not in (None, page_size):
        raise ConfigError(
            f"mem_triton.delta.tokens_per_state: SGLang keeps one state a KV page, and --page-size is {page_size}; "
            f"leave it out, or serve with --page-size {section.tokens_per_state}"
        )
    modules = dict(attention_modules(model))
    if not modules:
        raise ConfigError(
            f"δ-mem cannot be attached to {type(model).__name__}: none of its modules has qkv_proj, attn and o_proj"
        )
    for name, module in modules.items():
        check_attention(name, module.attn, "δ-mem")
    heads = shape.hf_config["num_attention_heads"] * shape.head_dim
    kv, hidden = shape.kv_heads * shape.head_dim, shape.hf_config["hidden_size"]
    dims = {name: AttentionDims(hidden, heads, kv, kv, hidden) for name in modules}
    weights = adapter.layers_for(dims, complete=len(shape.pp_spans) == 1)

    order, spec = sorted(adapter.layers, key=layer_order), adapter.config.spec
    device = next(model.parameters()).device
    slots = StateSlots([order.index(name) for name in weights], spec.state_size, shape.max_requests, device)
    states = DeltaStates(spec, slots, len(weights), page_size)
    reads = torch.zeros(shape.max_step_tokens, spec.read_width, dtype=torch.float32, device=device)
    rank, ranks = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
    for index, (name, layer) in enumerate(weights.items()):
        module = modules[name]
        kv_width = module.attn.tp_k_head_num * shape.head_dim
        sizes = (module.attn.tp_q_head_num * shape.head_dim, kv_width, kv_width)
        own = shard(layer, sizes, rank, ranks).to(device, shape.dtype)
        memory = DeltaMemory(own, sizes, reads, functools.partial(_advance, states, index), fuse=False)
        # The sum over ranks comes later, fused with the next norm: one rank adds the correction for all.
        adds_output = rank == 0 or module.o_proj.reduce_results
        _hook(module, memory, adds_output)
    logger.info(
        "δ-mem attached: %d of %d layers, rank %d, %d head(s), corrects %s, %d tokens per stored state, adapter %s",
        len(weights), len(modules), spec.rank, spec.heads, "".join(adapter.config.delta_heads) or "nothing",
        page_size, adapter.fingerprint[:12],
    )  # fmt: skip
    return states


def _hook(module: nn.Module, memory: DeltaMemory, adds_output: bool) -> None:
    """Let the projections of one attention module carry the memory. Both give (output, bias)."""

    def qkv(_: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> Any:
        return memory.correct_qkv(result[0], memory.read(inputs[0])), *result[1:]

    def output(_: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> Any:
        return memory.correct_output(result[0]), *result[1:]

    module.qkv_proj.register_forward_hook(qkv)
    if adds_output:
        module.o_proj.register_forward_hook(output)


def _advance(states: DeltaStates, layer: int, projections: Tensor, gate_bias: Tensor, reads: Tensor) -> None:
    states.advance(layer, projections, gate_bias, reads, getattr(get_attn_backend(), "mem_step", None))
