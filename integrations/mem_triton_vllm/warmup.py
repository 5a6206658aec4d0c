"""Compiles memory's kernels in vLLM's JIT warm-up, before CUDA graphs are captured and requests come.

vLLM's ``JitWarmupRegistry`` asks each provider that was registered while a model was loaded for its keys, once the KV
cache is there, and has it compile them. After that its monitor (``--jit-monitor-mode error``) allows no compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

from mem_triton.runtime.worker.warmup import Batch, batches, padding
from mem_triton.systems.delta_mem.warmup import launch
from mem_triton_vllm.backend import Step
from mem_triton_vllm.state_cache import DeltaStateCache, DeltaStateMetadata


class Key(NamedTuple):
    """One launch: a layer, by its name, and a batch of padding."""

    layer: str
    batch: Batch


class MemoryKernels:
    """The provider. Layers that launch the same kernels on tensors of the same kind count once."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = vllm_config

    def get_warmup_keys(self, vllm_config: VllmConfig) -> list[Key]:
        scheduler, found = self.config.scheduler_config, {}
        for name, layer in self.config.compilation_config.static_forward_context.items():
            if (kind := _kind(layer)) is not None:
                found.setdefault(kind, (name, _group(layer)))
        return [
            Key(name, batch)
            for name, group in found.values()
            for batch in batches(group, scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        ]

    def compile_many(self, keys: Iterable[Key]) -> None:
        for key in keys:
            layer = self.config.compilation_config.static_forward_context[key.layer]
            (self._step_states if isinstance(layer, DeltaStateCache) else self._attend)(layer, key.batch)

    def _attend(self, layer: Any, batch: Batch) -> None:
        impl, cache = layer.impl, layer.kv_cache
        heads = torch.empty(batch.tokens, impl.num_heads, impl.head_size, dtype=layer.dtype, device=cache.device)
        step = Step(batch.tokens, batch.longest, *padding(batch.rows, self._width, cache.device))
        if impl.mem_merges:
            log_sum = torch.empty(impl.num_heads, batch.tokens, device=cache.device)
            impl.mem_add(layer, heads, step, heads, [log_sum])
        else:
            impl.mem_attend(heads, cache, step, heads, only_readers=impl.mem_policy is None)

    def _step_states(self, layer: DeltaStateCache, batch: Batch) -> None:
        device, dtype = layer.kv_cache.device, self.config.model_config.dtype
        metadata = DeltaStateMetadata(*padding(batch.rows, self._width, device), batch.longest)
        step, prepare = (
            functools.partial(layer.step, metadata=metadata),
            functools.partial(layer.prepare, metadata=metadata),
        )
        width = layer.inputs and layer.inputs.width
        launch(layer.spec, batch.tokens, dtype, device, step, prepare, width)

    @property
    def _width(self) -> int:
        """Of block tables: the blocks of the longest request."""
        return -(-self.config.model_config.max_model_len // self.config.cache_config.block_size)


def register(vllm_config: VllmConfig) -> None:
    """Called while the model is loaded; does nothing in runners that have no registry."""
    JitWarmupRegistry.register(MemoryKernels(vllm_config))


def _group(layer: Any) -> int:
    return 1 if isinstance(layer, DeltaStateCache) else layer.impl.num_heads // layer.impl.num_kv_heads


def _kind(layer: Any) -> tuple | None:
    """Return a key that is equal for layers with the same compiled kernels; None for layers without kernels of ours."""
    if isinstance(layer, DeltaStateCache):
        inputs = layer.inputs
        return ("states", layer.spec, *_describe(layer.kv_cache), *_describe(vars(inputs).values() if inputs else ()))
    if isinstance(layer, Attention) and getattr(layer.impl, "mem_segments", None) is not None:
        read = layer.impl.mem_segments.read(1)
        return ("attention", layer.impl.num_heads, layer.impl.head_size, *_describe([layer.kv_cache, *read.values()]))
    return None


def _describe(values: Any) -> Iterator[Any]:
    """Of tensors, however nested: kind, strides and whether they begin on 16 bytes; of all else, itself."""
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor):
            yield value.dtype, value.stride(), value.data_ptr() % 16 == 0
        elif isinstance(value, tuple):
            yield from _describe(value)
        else:
            yield value
