"""A worker's memory of both kinds behind one door: runners tell it who enters, who leaves, and how the rows stand.

It hangs at the model as ``mem_triton``. δ-mem's half and explicit memory's half are each None when not configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from torch import nn
from vllm.config import VllmConfig

from mem_triton.config import MemTritonConfig
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.systems.request import carried_by
from mem_triton_vllm.attach import attach

if TYPE_CHECKING:
    from mem_triton_vllm.explicit_worker import BlockRow


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
    invariant = config.deterministic or envs.VLLM_BATCH_INVARIANT
    memory = WorkerMemory()
    if config.delta is not None:
        memory.slots = attach(vllm_config, model, config.delta, memory.lose_states)
        memory.slots.batch_invariant = invariant
    if config.memory is not None:
        from mem_triton_vllm.explicit_worker import attach_explicit

        policy = Policy(batch_invariant=True) if invariant else None
        memory.explicit = attach_explicit(vllm_config, model, config.memory, block_row, memory.lose_references, policy)
    return memory
