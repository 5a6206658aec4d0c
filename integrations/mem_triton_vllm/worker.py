"""A vLLM worker's memory: runners tell it who enters, who leaves, and how the rows stand.

The model has it as its attribute ``mem_triton``.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import vllm.envs as envs
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from mem_triton.config import MemTritonConfig
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, WorkerHost
from mem_triton.systems.request import carried_by
from mem_triton_vllm.attach import attach
from mem_triton_vllm.attention import BlockRow, attentions_of, connect, read_context
from mem_triton_vllm.shape import shape_of

logger = init_logger("vllm.mem_triton")


class WorkerMemory(BatchMemory):
    """What a worker of vLLM has; see ``BatchMemory``."""

    def enter(self, request_id: str, params: Any) -> None:
        """A request joins the batch. params: its sampling parameters, which carry what the front end resolved."""
        super().enter(request_id, lambda: carried_by(params))


def attach_memory(
    vllm_config: VllmConfig, model: nn.Module, config: MemTritonConfig, block_row: BlockRow
) -> WorkerMemory:
    """Give a loaded model the memory that its configuration asks for. Raises ConfigError naming what does not fit.

    block_row: reads a running request's row of the engine's block table.
    """
    memory = WorkerMemory()
    reads_segments = Capability.SEGMENTS in registry.required(config.systems)
    attentions = attentions_of(vllm_config) if reads_segments else {}
    invariant = config.deterministic or envs.VLLM_BATCH_INVARIANT
    policy = Policy(batch_invariant=True) if invariant else None
    host = WorkerHost(
        layers=sorted(attentions),
        tp_rank=get_tensor_model_parallel_rank(),
        rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
        device=next(model.parameters()).device,
        lose=memory.lose_step,
        exclusive=contextlib.nullcontext,  # vLLM calls its workers between steps, on the steps' stream
        on_stream=contextlib.nullcontext,
        read_kv=functools.partial(read_context, attentions, block_row),
        attach_states=functools.partial(attach, vllm_config, model, batch_invariant=invariant),
        deterministic=invariant,
    )
    memory.attach(config, shape_of(vllm_config), host)
    connect(attentions, memory, policy)
    logger.info("memory attached: %s", memory.describe())
    return memory
