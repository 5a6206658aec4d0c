"""SGLang attention backend ``mem_triton``: the platform's stock backend, with memory.

The stock backend is built as SGLang would build it and gets a class of its own that is ours and stock at once, so that
whatever SGLang asks of it is answered as before. δ-mem only needs to know each step's batch. Explicit memory computes
attention itself, in one softmax over the bank's constant prefix, a request's memory pages and its paged context; only
prefills in which no request reads the bank take the stock path.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention import PagedContext, memory_attention
from mem_triton.runtime.worker.memory import attend_or_lose
from mem_triton_sglang.hooks import check_hooks
from mem_triton_sglang.step import Step, StepBuilder
from mem_triton_sglang.worker import WorkerMemory, memory_of


def create(runner: Any) -> AttentionBackend:
    """The factory that SGLang's registry calls. Raises ConfigError for KV caches that memory cannot read."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend

    check_hooks()
    name = get_default_attn_backend(runner.server_args, runner.use_mla_backend, runner.model_config)
    backend = ATTENTION_BACKENDS[name](runner)
    memory = memory_of(runner.model)
    if memory is None:
        raise ConfigError("--attention-backend mem_triton: no memory hangs at the model")
    pool = runner.token_to_kv_pool
    if memory.has_segments and (type(pool) is not MHATokenToKVPool or pool.dtype != runner.dtype):
        raise ConfigError(
            f"memory in attention reads plain KV caches in the model's dtype, and this one is a {type(pool).__name__} "
            f"of {pool.dtype}; leave out --kv-cache-dtype, or the option that chooses the pool"
        )
    stock = type(backend)
    backend.__class__ = type(f"{stock.__name__}WithMemory", (BackendWithMemory, stock), {})
    backend.mem_triton = memory
    backend.mem_steps = StepBuilder(runner.req_to_token_pool.req_to_token, pool.page_size)
    if torch.device(runner.device).type != "cpu":
        from mem_triton_sglang.warmup import warm_up

        warm_up(backend, runner)
    return backend


class BackendWithMemory(AttentionBackend):
    """Goes in front of a stock backend's class. mem_step: the step that runs, or is captured, now."""

    needs_cpu_seq_lens = True
    mem_triton: WorkerMemory
    mem_steps: StepBuilder
    mem_step: Step | None = None

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

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if self._stock_extends:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, kwargs.get("sinks"))

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if self._stock_decodes:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, kwargs.get("sinks"))

    @property
    def _stock_extends(self) -> bool:
        """Whose prefill it is may not depend on the batch in the batch-invariant way."""
        memory = self.mem_triton
        return not memory.reads_segments_now and (memory.policy is None or not memory.has_segments)

    @property
    def _stock_decodes(self) -> bool:
        """A captured step cannot choose, so with a bank every decode computes with memory."""
        return not self.mem_triton.has_segments

    @property
    def _stock_captures(self) -> bool:
        """Whether the stock backend has to prepare captured steps, too; some know no graphs."""
        return self._stock_decodes and self._stock_implements("init_cuda_graph_state")

    def _stock_implements(self, method: str) -> bool:
        stock = type(self).__mro__[2]
        return getattr(stock, method) is not getattr(AttentionBackend, method)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q: [tokens, Hq * D]; returns the same shape."""
        if layer.attn_type != AttentionType.DECODER:
            raise ConfigError(f"layer {layer.layer_id} is not causal self-attention; memory is defined for decoders")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_layer(forward_batch, layer), k, v)
        step = self.mem_step
        memory = self.mem_triton.segments(layer.layer_id)
        read = {} if memory is None else memory.read(step.seq_lens.shape[0])
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(queries)
        attend = functools.partial(
            memory_attention, queries, self._context(layer, step), out, scale=layer.scaling,
            soft_cap=layer.logit_cap or 0.0, sinks=sinks, policy=self.mem_triton.policy,
        )  # fmt: skip
        attend_or_lose(attend, read, lambda error: self.mem_triton.lose_step(error, False))
        return out.view(q.shape[0], -1)

    def _context(self, layer: RadixAttention, step: Step) -> PagedContext:
        size = self.mem_steps.page_size
        pool = self.token_to_kv_pool
        pages = (
            buffer.unflatten(0, (-1, size)).transpose(1, 2)  # [slots, Hkv, D] -> [pages, Hkv, N, D]
            for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
        )
        return PagedContext(*pages, step.block_table, step.query_start_loc, step.seq_lens, step.max_query_len)
