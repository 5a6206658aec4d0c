"""Model Runner V1, which plain CPU builds of vLLM use because they have no Triton.

Why a patch: V1 has no per-request extension point in the worker. Upstream's answer is Model Runner V2 (``ModelState``),
see ``v2_runner``. Remove this file when vLLM's CPU worker runs V2 without Triton.
What is patched: two methods of ``GPUModelRunner``, in worker processes that loaded a model with memory, and both only
look at runners of such a model.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from mem_triton.config import DeltaSection
from mem_triton.runtime.request import carried_by
from mem_triton_vllm.attach import attach

_MARK = "_mem_triton_patched"


def prepare(vllm_config: VllmConfig, model: nn.Module, section: DeltaSection) -> None:
    """Mark ``model`` for memory; it is attached when vLLM asks for the KV cache specs, after LoRA has wrapped it."""
    model.mem_triton_pending = section
    if not hasattr(GPUModelRunner, _MARK):
        setattr(GPUModelRunner, _MARK, True)
        GPUModelRunner.get_kv_cache_spec = _attach_first(GPUModelRunner.get_kv_cache_spec)
        GPUModelRunner._update_states = _track_rows(GPUModelRunner._update_states)


def _attach_first(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_kv_cache_spec(runner: GPUModelRunner) -> Any:
        model = runner.get_model()
        section = getattr(model, "mem_triton_pending", None)
        if section is not None and not hasattr(model, "mem_triton_slots"):
            with set_default_torch_dtype(runner.model_config.dtype):
                model.mem_triton_slots = attach(runner.vllm_config, model, section)
        return stock(runner)

    return get_kv_cache_spec


def _track_rows(stock: Any) -> Any:
    @functools.wraps(stock)
    def _update_states(runner: GPUModelRunner, scheduler_output: Any) -> Any:
        slots = getattr(runner.get_model(), "mem_triton_slots", None)
        if slots is None:
            return stock(runner, scheduler_output)
        before = list(runner.input_batch.req_ids)
        for request_id in scheduler_output.finished_req_ids:
            slots.leave(request_id)
        result = stock(runner, scheduler_output)
        rows = runner.input_batch.req_ids
        for request_id in set(before) - set(rows):  # preempted, or not scheduled this time
            slots.leave(request_id)
        last = []
        for request_id in rows:
            request = runner.requests[request_id]
            slots.enter(request_id, carried_by(request.sampling_params))
            last.append(request.num_computed_tokens + scheduler_output.num_scheduled_tokens[request_id] - 1)
        slots.set_rows(rows, last)
        return result

    return _update_states
