"""Attach an adapter to a model that SGLang has loaded: hooks on its projections, tables for its requests.

Runs in every scheduler process, after LoRA has wrapped the projections and before the KV cache is sized. The model's
classes, parameters and their names stay as they are, so weights can still be updated while serving.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import Tensor, nn

from mem_triton.config import ConfigError
from mem_triton.runtime.worker.modules import attention_modules
from mem_triton.systems.delta_mem.adapter import DeltaMemAdapter
from mem_triton.systems.delta_mem.attach import DeltaLayers
from mem_triton.systems.delta_mem.folding import fold
from mem_triton.systems.delta_mem.layer_memory import DeltaMemory, has_launches
from mem_triton.systems.engine import EngineShape
from mem_triton_sglang.states import DeltaStates
from mem_triton_sglang.step import current_step

logger = logging.getLogger("sglang.mem_triton")


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


def attach(
    model: nn.Module,
    shape: EngineShape,
    adapter: DeltaMemAdapter,
    tokens_per_state: int | None,
    page_size: int,
    rank: int,
    lose: Callable[[BaseException], None],
    batch_invariant: bool = False,
) -> DeltaStates:
    """Attach an adapter to this rank's layers; returns their states, not allocated yet.

    tokens_per_state: as configured. page_size: tokens of a KV page. rank: of this process, among those that split
    heads. lose: told of an exception in a
    layer's step, whose requests lose their memory then.
    Raises ConfigError or AdapterError naming what does not fit.
    """
    if tokens_per_state not in (None, page_size):
        raise ConfigError(
            f"mem_triton.delta.tokens_per_state: SGLang keeps one state a KV page, and --page-size is {page_size}; "
            f"leave it out, or serve with --page-size {tokens_per_state}"
        )
    modules = attention_modules(model, RadixAttention, "δ-mem")
    for name, module in modules.items():
        check_attention(name, module.attn, "δ-mem")
    layers = DeltaLayers(adapter, modules, shape, rank, next(model.parameters()).device, batch_invariant)
    states = DeltaStates(layers.spec, layers.slots, len(layers.weights), page_size)
    launches = has_launches(layers.reads.device)
    rounded = layers.reads.to(shape.dtype) if launches else None
    how = "no layer of it is on this rank"
    for index, name in enumerate(layers.weights):
        module, attention = modules[name], modules[name].attn
        step = functools.partial(_advance, states, index, lose)
        heads = attention.tp_q_head_num, attention.tp_k_head_num
        memory = layers.memory(name, *heads, step, fuse=False, rounded=rounded)
        if launches:
            states.prepare_layer(index, memory.head_inputs(*heads, attention.qk_head_dim))
            prepare = functools.partial(_prepare, states, index, lose)
            how = _prepare_in_one_launch(module.qkv_proj, memory, prepare, folds=adapter.scope == "all")
        else:
            how = "operators of their own, as a CPU launches nothing"
            module.qkv_proj.register_forward_hook(functools.partial(_read_and_correct, memory))
        if _adds_output(module, rank):
            module.o_proj.register_forward_hook(functools.partial(_correct_output, memory))
    logger.info("δ-mem attached: %s; %s", layers.describe(page_size), how)
    return states


def _adds_output(module: nn.Module, rank: int) -> bool:
    """Whether this rank adds Δo: one does for all, where the sum over ranks comes later, fused with the next norm."""
    return rank == 0 or module.o_proj.reduce_results


def _read_and_correct(memory: DeltaMemory, _: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> Any:
    """Hook on ``qkv_proj``; projections give (output, bias)."""
    return memory.correct_qkv(result[0], memory.read(inputs[0])), *result[1:]


def _correct_output(memory: DeltaMemory, _: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> Any:
    """Hook on ``o_proj``."""
    return memory.correct_output(result[0]), *result[1:]


def _prepare_in_one_launch(
    qkv_proj: nn.Module, memory: DeltaMemory, prepare: Callable[..., None], folds: bool = True
) -> str:
    """Step and corrections behind the projection, whose matmul gives δ-mem's projections, too, where it can.

    prepare: (qkv, projections, gate_bias, reads, rounded) -> None. folds: False keeps the model's matmul as it is, to
    the bit. Returns how, for the log.
    """
    width, end = sum(memory.sizes), sum(memory.sizes) + len(memory.down)

    def advance(qkv: Tensor, projections: Tensor) -> None:
        prepare(qkv, projections, memory.gate_bias, memory.reads[: len(qkv)], memory.rounded[: len(qkv)])

    def whole(hidden: Tensor) -> tuple[Tensor, None]:
        projected = folded(hidden)
        advance(projected[:, :width], projected[:, width:end])
        return projected[:, :width], None

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> Any:
        advance(result[0], memory.project(inputs[0]))
        return result

    folded = fold(qkv_proj, memory, QKVParallelLinear, UnquantizedLinearMethod) if folds else None
    if folded is None:
        qkv_proj.register_forward_hook(hook)
    else:
        qkv_proj.forward = whole  # of this module alone; its class, parameters and hooks stay
    whose = "their own" if folded is None else "the model's"
    return f"step and corrections in one launch, projections in {whose} matmul"


def _advance(
    states: DeltaStates,
    layer: int,
    lose: Callable[[BaseException], None],
    projections: Tensor,
    gate_bias: Tensor,
    reads: Tensor,
) -> None:
    try:
        states.advance(layer, projections, gate_bias, reads, current_step())
    except Exception as error:
        reads.zero_()
        lose(error)


def _prepare(
    states: DeltaStates,
    layer: int,
    lose: Callable[[BaseException], None],
    qkv: Tensor,
    projections: Tensor,
    gate_bias: Tensor,
    reads: Tensor,
    rounded: Tensor,
) -> None:
    try:
        states.prepare(layer, qkv, projections, gate_bias, reads, rounded, current_step())
    except Exception as error:
        reads.zero_()
        rounded.zero_()
        lose(error)
