"""Memory's kernels compiled before SGLang captures graphs and takes requests.

SGLang makes its attention backend after the KV cache and before its graphs; it has no place where plugins warm up.
"""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from mem_triton.ops.memory_attention import AttentionCall, memory_attention
from mem_triton.runtime.worker.modules import attention_modules
from mem_triton.runtime.worker.warmup import Batch, batches
from mem_triton.systems.delta_mem.folding import empty_projections
from mem_triton_sglang.shape import shape_of
from mem_triton_sglang.step import Step

logger = logging.getLogger("sglang.mem_triton")


def warm_up(backend: Any, runner: Any) -> None:
    """Launch every kernel of ours on batches of padding, one layer for all that read the same kinds of memory."""
    begun, shape, memory = time.perf_counter(), shape_of(runner.server_args, runner.model_config), backend.mem_triton
    layers = {}
    if memory.has_segments:
        for module in attention_modules(runner.model, RadixAttention, "memory in attention").values():
            read = memory.segments(module.attn.layer_id)
            layers.setdefault(None if read is None else (read.pages is None, read.sink is None), module.attn)
    group = shape.heads // shape.kv_heads
    # Block tables are as wide as a step's longest row; only one as wide as they come lets short queries be divided.
    widths = (1, backend.mem_steps.max_pages)
    for batch, width in itertools.product(batches(group, shape.max_requests, shape.max_step_tokens), widths):
        step = _padding(backend, batch, width)
        if memory.states is not None and memory.states.layers:
            _advance(memory.states, batch, step, shape.dtype)
        for layer in layers.values():
            _attend(backend, layer, batch, step, shape.dtype)
    logger.info("mem_triton: kernels are compiled, in %.1f s", time.perf_counter() - begun)


def _padding(backend: Any, batch: Batch, width: int) -> Step:
    """A step in which nobody asks anything. width: of its block table."""
    ints = {"dtype": torch.int32, "device": backend.mem_steps.req_to_token.device}
    blocks = torch.zeros(batch.rows, width, **ints)
    return Step(blocks, torch.zeros(batch.rows + 1, **ints), torch.zeros(batch.rows, **ints), batch.longest)


def _advance(states: Any, batch: Batch, step: Step, dtype: torch.dtype) -> None:
    spec, device = states.spec, step.seq_lens.device
    reads = torch.empty(batch.tokens, spec.read_width, device=device)
    bias = torch.zeros(spec.bias_width, device=device)
    if 0 not in states.inputs:
        projections = torch.empty(batch.tokens, spec.projection_width, dtype=dtype, device=device)
        states.advance(0, projections, bias, reads, step)
        return
    widths = states.inputs[0].width, spec.projection_width
    rounded = reads.to(dtype)
    for qkv, projections in empty_projections(batch.tokens, *widths, dtype, device):
        states.prepare(0, qkv, projections, bias, reads, rounded, step)


def _attend(backend: Any, layer: RadixAttention, batch: Batch, step: Step, dtype: torch.dtype) -> None:
    heads = (batch.tokens, layer.tp_q_head_num, layer.qk_head_dim)
    queries = torch.empty(heads, dtype=dtype, device=step.seq_lens.device)
    memory = backend.mem_triton.segments(layer.layer_id)
    call = AttentionCall(
        queries,
        backend._context(layer, step),
        torch.empty_like(queries),
        layer.scaling,
        soft_cap=layer.logit_cap or 0.0,
        only_readers=backend.mem_triton.policy is None,
        **({} if memory is None else memory.read(batch.rows)),
    )
    memory_attention(call, policy=backend.mem_triton.policy)
