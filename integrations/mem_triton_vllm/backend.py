"""Adds memory to vLLM's own attention backend, for the rows that read some.

The backend that vLLM has chosen for a layer gets a class of its own that is ours and stock at once: its builder, its
metadata, its KV layout and cache update, its CUDA-graph support. A step in which no row reads memory is the stock step.
In others the rows that do get attention over memory and context in one softmax: by merging memory into the stock
result where the backend gives a log-sum-exp (``flash_lse``), else by attending those rows anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention import AttentionCall, PagedContext, Policy, add_memory, memory_attention
from mem_triton.ops.memory_attention.planned import PlannedLayer, Plans
from mem_triton.runtime.worker.memory import BatchMemory, attend_or_lose
from mem_triton.systems.base import LayerSegments
from mem_triton_vllm import flash_lse
from mem_triton_vllm.cache_layout import CacheLayout, layout_of_cache


@dataclass
class Step:
    """What memory needs of a step's batch; device tensors but for the two numbers. plans: see ``PlannedLayer``."""

    tokens: int  # without padding
    max_query_len: int
    query_start_loc: Tensor  # int32 [rows + 1]
    seq_lens: Tensor  # int32 [rows], length after this step
    block_table: Tensor  # int32 [rows, max_blocks]
    plans: Plans = field(default_factory=dict)


class BuilderWithMemory(AttentionMetadataBuilder):
    """Overrides a stock builder: adds the step to its metadata, as ``mem_triton``."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layouts: dict[type, CacheLayout] = {}
        if torch.device(device).type == "cpu":
            from mem_triton.ops.memory_attention.cpu import paged_numba  # not before vLLM has started

            paged_numba.warm_up(vllm_config.model_config.dtype)
        for name, layer in layers.items():
            kind = type(layer.impl)
            if kind not in layouts:
                layouts[kind] = layout_of_cache(name, layer, kv_cache_spec, device)
            layer.impl.mem_set_layout(layouts[kind])

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        m = common_attn_metadata
        metadata.mem_triton = Step(
            m.num_actual_tokens, m.max_query_len, m.query_start_loc, m.seq_lens, m.block_table_tensor
        )
        return metadata

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        updated.mem_triton = replace(metadata.mem_triton, block_table=blk_table, plans={})
        return updated


class AttentionWithMemory(AttentionImpl):
    """Overrides a stock implementation: adds to its result what rows read of memory.

    mem_batch: which rows of the step read memory; None until ``mem_connect``. mem_segments: what this layer reads
    besides its context, None for nothing. mem_policy: how; None leaves that to each step's batch. mem_layout: how the
    KV cache lies; None until ``mem_set_layout``. mem_planned: what stays between steps.
    """

    mem_batch: BatchMemory | None = None
    mem_segments: LayerSegments | None = None
    mem_policy: Policy | None = None
    mem_layout: CacheLayout | None = None
    mem_planned: PlannedLayer

    def mem_connect(self, batch: BatchMemory, segments: LayerSegments | None, policy: Policy | None) -> None:
        """Read memory from now on; vLLM has built this object before there was any."""
        self.mem_batch, self.mem_segments, self.mem_policy = batch, segments, policy
        self.mem_planned = PlannedLayer()

    def mem_set_layout(self, layout: CacheLayout) -> None:
        """Read the KV cache as ``layout`` says from now on; vLLM knows of the cache after it has built this object."""
        self.mem_layout = layout

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """query, output: [tokens, Hq, D]; kv_cache: [blocks, Hkv, N, 2D] as the stock backend keeps it."""
        stock = functools.partial(
            super().forward, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        step: Step | None = getattr(attn_metadata, "mem_triton", None)
        if step is None or self.mem_segments is None:
            return stock()
        captured, alone = _is_captured(), self.mem_policy is not None and self.mem_policy.batch_invariant
        if not (self.mem_batch.reading or captured or alone):
            return stock()
        attend = functools.partial(self.mem_attend, query, kv_cache, step, output)
        if alone:  # no other way's bits are the same in any batch
            attend_or_lose(attend, functools.partial(attend, read={}), self._lose)
        elif self.mem_merges:
            with flash_lse.collected() as log_sums:
                stock()
            attend_or_lose(functools.partial(self.mem_add, layer, query, step, output, log_sums), stock, self._lose)
        else:
            if captured or not all(self.mem_batch.reading):
                stock()
            attend_or_lose(functools.partial(attend, only_readers=True), stock, self._lose)
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: memory is added to the output."""
        return False

    @property
    def mem_merges(self) -> bool:
        """Whether the stock result comes with a log-sum-exp into which memory can be merged."""
        return self._sinks is None and flash_lse.gives_log_sums(self)

    def mem_attend(
        self,
        query: Tensor,
        kv_cache: Tensor,
        step: Step,
        output: Tensor,
        only_readers: bool = False,
        read: dict[str, Any] | None = None,
    ) -> None:
        """Memory and context of a step's rows in one softmax. read: None for what the layer reads."""
        make = functools.partial(self._call, query, kv_cache, step, output, only_readers, read)
        if only_readers and read is None and self.mem_policy is None:
            self.mem_planned.attend(query, output, kv_cache, step.plans, make)
        else:
            memory_attention(make(), policy=self.mem_policy)

    def _call(
        self,
        query: Tensor,
        kv_cache: Tensor,
        step: Step,
        output: Tensor,
        only_readers: bool,
        read: dict[str, Any] | None,
    ) -> AttentionCall:
        heads = (step.tokens, self.num_heads, self.head_size)
        return AttentionCall(
            query[: step.tokens].view(heads),
            self.mem_context(kv_cache, step),
            output[: step.tokens].view(heads),
            self.scale,
            soft_cap=_soft_cap(self),
            sinks=self._sinks,
            only_readers=only_readers,
            **(self.mem_segments.read(len(step.seq_lens)) if read is None else read),
        )

    def mem_add(self, layer: Any, query: Tensor, step: Step, output: Tensor, log_sums: list[Tensor]) -> None:
        """Merge memory into what the stock backend has left. log_sums: [Hq, tokens], natural logarithms, one."""
        heads, (log_sum,) = (step.tokens, self.num_heads, self.head_size), log_sums
        if query.dtype != output.dtype:  # quantised for an 8-bit KV cache
            query = query.to(output.dtype) * layer._q_scale.to(output.dtype)
        call = AttentionCall(
            query[: step.tokens].view(heads),
            PagedContext.elsewhere(step.query_start_loc, step.seq_lens, step.max_query_len),
            output[: step.tokens].view(heads),
            self.scale,
            soft_cap=_soft_cap(self),
            lse=log_sum.t(),
            **self.mem_segments.read(len(step.seq_lens)),
        )
        add_memory(call)

    def mem_context(self, kv_cache: Tensor, step: Step) -> PagedContext:
        """The rows' context, as memory attention reads it."""
        keys, values = self.mem_layout.split(kv_cache)
        return PagedContext(
            keys,
            values,
            step.block_table,
            step.query_start_loc,
            step.seq_lens,
            step.max_query_len,
            self.mem_layout.packing,
        )

    @property
    def _sinks(self) -> Tensor | None:
        sinks = getattr(self, "sinks", None)
        return None if sinks is None else sinks.float()

    def _lose(self, error: BaseException) -> None:
        self.mem_batch.lose_step(error, False)


def add_to(name: str, attention: Attention) -> None:
    """Give a layer's stock backend and implementation our classes. Raises ConfigError for what memory cannot serve."""
    impl = attention.impl
    obstacles = {
        "ALiBi slopes: a memory has no distance to slope by": getattr(impl, "alibi_slopes", None) is not None,
        f"heads of {impl.head_size} channels: its kernels have 32 to 256": not 32 <= impl.head_size <= 256,
        "a KV cache in another dtype than the model's, under an attention backend that gives no log-sum-exp; leave "
        "--kv-cache-dtype out": attention.kv_cache_torch_dtype != attention.dtype
        and not flash_lse.gives_log_sums(impl),
        f"{attention.attn_backend.get_name()}, which writes the KV cache inside of attention; choose another "
        "--attention-backend": attention.attn_backend.forward_includes_kv_cache_update,
    }
    for what, there in obstacles.items():
        if there:
            raise ConfigError(f"memory in attention cannot be attached to {name}: the layer has {what}")
    attention.attn_backend = with_memory(attention.attn_backend)
    impl.__class__ = implementation_with_memory(type(impl))
    if flash_lse.gives_log_sums(impl):
        flash_lse.install()


@functools.cache
def with_memory(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend's class with memory."""
    builder = _joined(BuilderWithMemory, stock.get_builder_cls())
    implementation = implementation_with_memory(stock.get_impl_cls())
    methods: dict[str, Callable[..., Any]] = {
        "get_builder_cls": lambda: builder,
        "get_impl_cls": lambda: implementation,
    }
    return type(
        f"{stock.__name__}WithMemory",
        (stock,),
        {"__module__": __name__} | {n: staticmethod(m) for n, m in methods.items()},
    )


@functools.cache
def implementation_with_memory(stock: type[AttentionImpl]) -> type[AttentionImpl]:
    """A backend's implementation with memory."""
    return _joined(AttentionWithMemory, stock)


def _joined(ours: type, stock: type) -> type:
    return type(f"{stock.__name__}WithMemory", (ours, stock), {"__module__": __name__})


def _is_captured() -> bool:
    """Whether this step is, or goes into, a CUDA graph of the whole model: whatever it does, all its replays do."""
    return is_forward_context_available() and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL


def _soft_cap(impl: Any) -> float:
    """The stock implementations call it so, or so."""
    return float(getattr(impl, "logits_soft_cap", None) or 0.0)
