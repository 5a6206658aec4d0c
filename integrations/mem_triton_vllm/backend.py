"""vLLM attention backend: one softmax over the bank's constant prefix, a request's memory pages and its paged context.

vLLM offers the slot ``CUSTOM`` for backends of others, and CUDA takes it by name. Its CPU platform ignores the choice
and always takes ``CPU_ATTN``, so there the override of that slot is set while the model is built, and taken back after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from mem_triton.config import ConfigError
from mem_triton.ops.memory_attention import PagedContext, Policy, memory_attention
from mem_triton.runtime.worker.memory import attend_or_lose
from mem_triton.systems.base import LayerSegments


@dataclass
class MemoryAttentionMetadata:
    """One step's batch; device tensors except the two lengths."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor  # int32 [rows + 1]
    seq_lens: Tensor  # int32 [rows], length after this step
    block_table: Tensor  # int32 [rows, max_blocks]
    slot_mapping: Tensor  # int64 [tokens]


class MemoryAttentionMetadataBuilder(AttentionMetadataBuilder[MemoryAttentionMetadata]):
    """Passes the common metadata on. Nothing is computed on the host, so every CUDA graph mode is supported."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MemoryAttentionMetadata:
        m = common_attn_metadata
        return MemoryAttentionMetadata(
            m.num_actual_tokens, m.max_query_len, m.query_start_loc, m.seq_lens, m.block_table_tensor, m.slot_mapping
        )


class MemoryAttentionBackend(AttentionBackend):
    """Decoder attention on any KV-cache layout, with memory."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name  # vLLM looks the name up in its enum

    @staticmethod
    def get_impl_cls() -> type[MemoryAttentionImpl]:
        return MemoryAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[MemoryAttentionMetadataBuilder]:
        return MemoryAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


class MemoryAttentionImpl(AttentionImpl):
    """One layer's attention. Without ``mem_triton_memory`` at the layer it is plain causal attention.

    policy: which way it takes; None leaves that to each step's batch. lose: told of an exception with memory.
    """

    policy: Policy | None = None
    lose: Callable[[BaseException], None]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        unsupported = {
            "ALiBi slopes": alibi_slopes,
            "a sliding window (serve with --disable-sliding-window if the model's quality allows)": sliding_window,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise ConfigError(f"memory in attention does not support models with {name}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.soft_cap = kv_cache_dtype, logits_soft_cap or 0.0
        self.sinks = None if sinks is None else sinks.float()

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write this step's keys and values, [tokens, Hkv, D], into the cache [blocks, Hkv, N, 2D]."""
        if kv_cache.numel() == 0:
            return
        if kv_cache.is_cuda:
            from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

            keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            triton_reshape_and_cache_flash(
                key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
            )
            return
        real = slot_mapping >= 0
        slots = slot_mapping[real]
        tokens = torch.cat([key, value], dim=-1)[: len(real)][real].to(kv_cache.dtype)  # [tokens, Hkv, 2D]
        block_size = kv_cache.shape[2]
        kv_cache.transpose(1, 2)[slots // block_size, slots % block_size] = tokens

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MemoryAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output: [tokens, Hq, D]; kv_cache: [blocks, Hkv, N, 2D] in any physical order."""
        if attn_metadata is None:  # vLLM's memory profiling run
            return output.zero_()
        m = attn_metadata
        keys, values = kv_cache.split(self.head_size, dim=-1)
        context = PagedContext(keys, values, m.block_table, m.query_start_loc, m.seq_lens, m.max_query_len)
        memory: LayerSegments | None = getattr(layer, "mem_triton_memory", None)
        read = {} if memory is None else memory.read(m.seq_lens.shape[0])
        tokens = m.num_actual_tokens
        heads = (tokens, self.num_heads, self.head_size)
        attend = functools.partial(
            memory_attention, query[:tokens].view(heads), context, output[:tokens].view(heads), scale=self.scale,
            soft_cap=self.soft_cap, sinks=self.sinks, policy=self.policy,
        )  # fmt: skip
        attend_or_lose(attend, read, self.lose)
        return output


PATH = f"{MemoryAttentionBackend.__module__}.{MemoryAttentionBackend.__qualname__}"


@contextmanager
def chosen_for(vllm_config: VllmConfig) -> Iterator[None]:
    """While the model is built, its attention layers take this backend. Raises ConfigError if another one was asked."""
    chosen = vllm_config.attention_config.backend
    if chosen not in (None, AttentionBackendEnum.CUSTOM):
        raise ConfigError(
            f"memory in attention needs its own attention backend, and --attention-backend asks for {chosen.name}; "
            "leave the option out"
        )
    if not current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CUSTOM, PATH)
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
        yield
        return
    register_backend(AttentionBackendEnum.CPU_ATTN, PATH)
    selector._cached_get_attn_backend.cache_clear()  # it would answer from before
    try:
        yield
    finally:  # other models in this process keep the stock one
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()
