"""Adds memory to the attention backend that SGLang would have chosen, under the name ``mem_triton``.

The stock backend is built as SGLang would build it and gets a class of its own that is ours and stock at once, so that
whatever SGLang asks of it is answered as before. δ-mem only needs to know each step's batch. With explicit memory a
step in which no row reads the bank is the stock step; rows that do read it are attended anew, in one softmax over the
bank's constant prefix, their memory pages and their paged context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention import AttentionCall, PagedContext, memory_attention
from mem_triton.ops.memory_attention.planned import PlannedLayer
from mem_triton.runtime.worker.memory import attend_or_lose
from mem_triton_sglang.held import memory_of
from mem_triton_sglang.hooks import check_hooks
from mem_triton_sglang.step import Step, StepBuilder
from mem_triton_sglang.worker import SGLangWorkerMemory


def create(runner: Any) -> AttentionBackend:
    """The factory that SGLang's registry calls. Raises ConfigError for KV caches that memory cannot read."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend

    check_hooks()
    name = get_default_attn_backend(runner.server_args, runner.use_mla_backend, runner.model_config)
    backend = ATTENTION_BACKENDS[name](runner)
    memory = memory_of(runner.model)
    if memory is None:
        raise ConfigError("--attention-backend mem_triton: the model has no memory; was it loaded by another runner?")
    pool = runner.token_to_kv_pool
    if memory.has_segments and (type(pool) is not MHATokenToKVPool or pool.dtype != runner.dtype):
        raise ConfigError(
            f"memory in attention reads plain KV caches in the model's dtype, and this one is a {type(pool).__name__} "
            f"of {pool.dtype}; leave out --kv-cache-dtype, or the option that chooses the pool"
        )
    stock = type(backend)
    backend.__class__ = type(f"{stock.__name__}WithMemory", (BackendWithMemory, stock), {})
    backend.mem_connect(memory, StepBuilder(runner.req_to_token_pool.req_to_token, pool.page_size))
    if torch.device(runner.device).type == "cpu":
        if memory.has_segments:
            from mem_triton.ops.memory_attention.cpu import paged_numba

            paged_numba.warm_up(runner.dtype)
    else:
        from mem_triton_sglang.warmup import warm_up

        warm_up(backend, runner)
    return backend


class BackendWithMemory(AttentionBackend):
    """Overrides a stock backend: adds to its result what rows read of memory.

    mem_step: the step that runs, or is captured, now; others have it from ``step.current_step``. mem_planned: what
    stays between steps, by layer.
    """

    needs_cpu_seq_lens = True
    mem_triton: SGLangWorkerMemory
    mem_steps: StepBuilder
    mem_step: Step | None = None
    mem_planned: dict[int, PlannedLayer]

    def mem_connect(self, memory: SGLangWorkerMemory, steps: StepBuilder) -> None:
        """Read memory from now on; SGLang's own constructor has built this object."""
        self.mem_triton, self.mem_steps, self.mem_planned = memory, steps, {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.mem_step = self.mem_steps.eager(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if self._stock_captures:
            super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.mem_steps.allocate(max_bs)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        captured = in_capture or not isinstance(forward_batch, ForwardBatch)
        if self._stock_captures or not captured:
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if captured:
            self.mem_step = self.mem_steps.captured(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if self._stock_captures:
            super().init_forward_metadata_in_graph(forward_batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return super().get_cuda_graph_seq_len_fill_value() if self._stock_captures else 1

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(super().forward_extend, *args, **kwargs)

    def forward_decode(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(super().forward_decode, *args, **kwargs)

    @property
    def _is_stock_step(self) -> bool:
        """Whether no row of the step reads more than its context. What is captured serves all steps to come."""
        memory = self.mem_triton
        return not memory.has_segments or not (memory.reading or self.mem_step.captured or self._alone)

    @property
    def _alone(self) -> bool:
        """Whether every row is attended here: batch-invariant, or captured where the stock backend captures none."""
        policy = self.mem_triton.policy
        invariant = policy is not None and policy.batch_invariant
        return invariant or (self.mem_step.captured and not self._stock_captures)

    @property
    def _stock_captures(self) -> bool:
        """Whether the stock backend prepares captured steps, too; some do not support graphs."""
        stock = type(self).__mro__[2]
        return stock.init_cuda_graph_state is not AttentionBackend.init_cuda_graph_state

    def _forward(
        self,
        forward: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """The stock result, in which rows with memory have theirs. forward: the stock method; q: [tokens, Hq * D],
        returns the same shape.
        """
        stock = functools.partial(forward, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self._is_stock_step:
            return stock()
        if layer.attn_type != AttentionType.DECODER:
            raise ConfigError(f"layer {layer.layer_id} is not causal self-attention; memory is defined for decoders")
        memory, step = self.mem_triton.segments(layer.layer_id), self.mem_step
        if memory is None and not self._alone:
            return stock()
        read = {} if memory is None else memory.read(step.seq_lens.shape[0])
        if self._alone or (not step.captured and all(self.mem_triton.reading)):  # nobody needs the stock result
            if save_kv_cache and k is not None:
                self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_layer(forward_batch, layer), k, v)
            out = torch.empty_like(q)
        else:
            out = stock()
        attend = functools.partial(self.mem_attend, q, out, layer, step, sinks=kwargs.get("sinks"))
        otherwise = functools.partial(attend, {}) if self._alone else lambda: out.copy_(stock())
        attend_or_lose(
            functools.partial(attend, read, only_readers=not self._alone),
            otherwise,
            lambda error: self.mem_triton.lose_step(error, False),
        )
        return out

    def mem_attend(
        self,
        q: Tensor,
        out: Tensor,
        layer: RadixAttention,
        step: Step,
        read: Mapping[str, Any],
        only_readers: bool = False,
        sinks: Tensor | None = None,
    ) -> None:
        """Memory and context of a step's rows in one softmax. q, out: [tokens, Hq * D]. read: what the layer reads."""
        make = functools.partial(self._call, q, out, layer, step, read, only_readers, sinks)
        if not only_readers or self.mem_triton.policy is not None or not q.is_contiguous():
            memory_attention(make(), policy=self.mem_triton.policy)
            return
        planned = self.mem_planned.setdefault(layer.layer_id, PlannedLayer())
        planned.attend(q, out, self.token_to_kv_pool.get_key_buffer(layer.layer_id), step.plans, make)

    def _call(
        self,
        q: Tensor,
        out: Tensor,
        layer: RadixAttention,
        step: Step,
        read: Mapping[str, Any],
        only_readers: bool,
        sinks: Tensor | None,
    ) -> AttentionCall:
        heads = (-1, layer.tp_q_head_num, layer.qk_head_dim)
        return AttentionCall(
            q.reshape(heads),
            self._context(layer, step),
            out.view(heads),
            layer.scaling,
            soft_cap=layer.logit_cap or 0.0,
            sinks=sinks,
            only_readers=only_readers,
            **read,
        )

    def _context(self, layer: RadixAttention, step: Step) -> PagedContext:
        size = self.mem_steps.page_size
        pool = self.token_to_kv_pool
        pages = (
            buffer.unflatten(0, (-1, size)).transpose(1, 2)  # [slots, Hkv, D] -> [pages, Hkv, N, D]
            for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
        )
        return PagedContext(*pages, step.block_table, step.query_start_loc, step.seq_lens, step.max_query_len)
