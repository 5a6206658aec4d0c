"""Tells memory of a step's rows under Model Runner V1, which plain CPU builds of vLLM use: they have no Triton.

Why a patch: V1 has no per-request extension point in the worker. Upstream's answer is Model Runner V2 (``ModelState``),
see ``v2_runner``. Remove this file when vLLM's CPU worker runs V2 without Triton.
What is patched: two methods of ``GPUModelRunner``, in worker processes that loaded a model with memory, and both only
look at runners of such a model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from mem_triton.config import MemTritonConfig
from mem_triton_vllm.held import give, memory_of
from mem_triton_vllm.worker import VLLMWorkerMemory, attach_memory

if TYPE_CHECKING:
    from mem_triton_vllm.attention import BlockRow

_MARK = "_mem_triton_patched"


def prepare(vllm_config: VllmConfig, model: nn.Module, config: MemTritonConfig) -> None:
    """Mark ``model`` for memory; it is attached when vLLM asks for the KV cache specs, after LoRA has wrapped it."""
    model.mem_triton_pending = config
    if not hasattr(GPUModelRunner, _MARK):
        setattr(GPUModelRunner, _MARK, True)
        GPUModelRunner.get_kv_cache_spec = _attach_first(GPUModelRunner.get_kv_cache_spec)
        GPUModelRunner._update_states = _track_rows(GPUModelRunner._update_states)


def _attach_first(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_kv_cache_spec(runner: GPUModelRunner) -> Any:
        model = runner.get_model()
        config = getattr(model, "mem_triton_pending", None)
        if config is not None and memory_of(model) is None:
            with set_default_torch_dtype(runner.model_config.dtype):
                give(model, attach_memory(runner.vllm_config, model, config, _block_rows(runner)))
        return stock(runner)

    return get_kv_cache_spec


def _track_rows(stock: Any) -> Any:
    @functools.wraps(stock)
    def _update_states(runner: GPUModelRunner, scheduler_output: Any) -> Any:
        memory: VLLMWorkerMemory | None = memory_of(runner.get_model())
        if memory is None:
            return stock(runner, scheduler_output)
        with memory.lock:  # whoever looks from outside finds the batch before the update, or after it
            finished = scheduler_output.finished_req_ids
            scheduled = scheduler_output.num_scheduled_tokens
            for request_id in list(runner.input_batch.req_ids):
                if request_id in finished or request_id not in scheduled:  # finished, preempted, or left out this time
                    memory.leave(request_id)
            result = stock(runner, scheduler_output)
            rows = runner.input_batch.req_ids
            first = []
            for request_id in rows:
                request = runner.requests[request_id]
                if not memory.is_inside(request_id):
                    memory.enter(request_id, request.sampling_params)
                first.append(request.num_computed_tokens)
            memory.begin_step(rows, first, [n + scheduled[r] - 1 for n, r in zip(first, rows, strict=True)])
            return result

    return _update_states


def _block_rows(runner: GPUModelRunner) -> BlockRow:
    def block_row(request_id: str) -> Tensor:
        batch = runner.input_batch
        return batch.block_table[0].block_table.cpu[batch.req_id_to_index[request_id]]

    return block_row
