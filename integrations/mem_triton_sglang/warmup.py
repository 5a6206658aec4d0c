"""Compiles memory's kernels before SGLang captures graphs and takes requests.

SGLang makes its attention backend after the KV cache and before its graphs; it has no place where plugins warm up.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor

from mem_triton.runtime.worker.modules import attention_modules
from mem_triton.runtime.worker.warmup import Batch, batches, padding
from mem_triton.systems.delta_mem.warmup import launch
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
        rows = padding(batch.rows, width, backend.mem_steps.req_to_token.device)
        step = Step(rows.block_table, rows.query_start_loc, rows.seq_lens, batch.longest)
        if memory.states is not None and memory.states.layers:
            _advance(memory.states, batch, step, shape.dtype)
        for layer in layers.values():
            _attend(backend, layer, batch, step, shape.dtype)
    logger.info("mem_triton: kernels are compiled, in %.1f s", time.perf_counter() - begun)


def _advance(states: Any, batch: Batch, step: Step, dtype: torch.dtype) -> None:
    def prepare(qkv: Tensor, projections: Tensor, bias: Tensor, reads: Tensor) -> None:
        states.prepare(0, qkv, projections, bias, reads, reads.to(dtype), step)

    advance = functools.partial(states.advance, 0, step=step)
    width = states.inputs[0].width if 0 in states.inputs else None
    launch(states.spec, batch.tokens, dtype, step.seq_lens.device, advance, prepare, width)


def _attend(backend: Any, layer: RadixAttention, batch: Batch, step: Step, dtype: torch.dtype) -> None:
    heads = (batch.tokens, layer.tp_q_head_num, layer.qk_head_dim)
    queries = torch.empty(heads, dtype=dtype, device=step.seq_lens.device)
    memory, alone = backend.mem_triton.segments(layer.layer_id), backend.mem_triton.policy is not None
    read = {} if memory is None else memory.read(batch.rows)
    backend.mem_attend(queries, torch.empty_like(queries), layer, step, read, only_readers=not alone)
