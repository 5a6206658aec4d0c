"""Attaches memory to a vLLM worker; its runner passes which requests enter and leave, and the order of rows.

The model has it as its attribute ``mem_triton``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import vllm.envs as envs
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from mem_triton.config import MemTritonConfig
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.channel import ChannelError
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.runtime.worker.service import serve_memory
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, WorkerHost
from mem_triton.systems.request import carried_by
from mem_triton_vllm.attach import attach
from mem_triton_vllm.attention import BlockRow, attentions_of, connect, read_context
from mem_triton_vllm.layer_io import layers_of
from mem_triton_vllm.refusals import has_one_front_end
from mem_triton_vllm.shape import shape_of

logger = init_logger("vllm.mem_triton")


class VLLMWorkerMemory(BatchMemory):
    """What a worker of vLLM has; see ``BatchMemory``."""

    on_stream: StepStream

    def enter(self, request_id: str, params: Any) -> None:
        """A request joins the batch. params: its sampling parameters, which carry what the front end resolved."""
        super().enter(request_id, lambda: carried_by(params))

    def begin_step(self, request_ids: Sequence[str], first: Sequence[int], last: Sequence[int]) -> None:
        self.on_stream.note()
        super().begin_step(request_ids, first, last)


def attach_memory(
    vllm_config: VllmConfig, model: nn.Module, config: MemTritonConfig, block_row: BlockRow
) -> VLLMWorkerMemory:
    """Give a loaded model the memory that its configuration asks for. Raises ConfigError naming what does not fit.

    block_row: reads a running request's row of the engine's block table.
    """
    device = next(model.parameters()).device
    memory = VLLMWorkerMemory()
    memory.on_stream = StepStream(device)
    reads_segments = Capability.SEGMENTS in registry.required(config.systems)
    attentions = attentions_of(vllm_config) if reads_segments else {}
    invariant = config.deterministic or envs.VLLM_BATCH_INVARIANT
    policy = Policy(batch_invariant=True) if invariant else None
    host = WorkerHost(
        layers=sorted(attentions),
        tp_rank=get_tensor_model_parallel_rank(),
        rank=own_rank(),
        device=device,
        lose=memory.lose_step,
        exclusive=memory.exclusive,
        on_stream=memory.on_stream,
        read_kv=functools.partial(read_context, attentions, block_row),
        attach_states=functools.partial(attach, vllm_config, model, batch_invariant=invariant),
        layer_io=functools.partial(
            layers_of, model, vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)
        ),
        deterministic=invariant,
        chat=True,
    )
    memory.attach(config, shape_of(vllm_config), host)
    connect(attentions, memory, policy)
    if has_one_front_end(vllm_config):  # several keep no memory that workers are asked for
        try:
            serve_memory(memory, own_rank())
        except ChannelError as error:  # by several API servers, or on another machine: theirs refuse what needs it
            logger.warning("mem_triton: no front end can call this worker: %s", error)
    logger.info("memory attached: %s", memory.describe())
    return memory


def own_rank() -> int:
    """This worker among all of its engine."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class StepStream:
    """The stream on which steps are queued; ``with stream():`` queues work among them, from any thread.

    note: called in the thread that runs the steps; vLLM may move them to another stream after the model is loaded. A
    CPU has no streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        self.note()

    def note(self) -> None:
        """The current stream is that of the steps."""
        if self._device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._device)

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
