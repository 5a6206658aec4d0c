"""A worker's memory of both kinds behind one door: runners tell it who enters, who leaves, and how the rows stand.

It hangs at the model as ``mem_triton``. δ-mem's half and explicit memory's half are each None when not configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from torch import nn
from vllm.config import VllmConfig

from mem_triton.config import MemTritonConfig
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.request import carried_by
from mem_triton.runtime.slots import StateSlots
from mem_triton_vllm.attach import attach

if TYPE_CHECKING:
    from mem_triton.runtime.worker.explicit import ExplicitMemory
    from mem_triton_vllm.explicit_worker import BlockRow


@dataclass
class WorkerMemory:
    """slots: δ-mem's states. explicit: the pool of pages, its tables, its loader and its captures."""

    slots: StateSlots | None = None
    explicit: ExplicitMemory | None = None

    def enter(self, request_id: str, params: Any) -> None:
        """A request joins the batch. params: its sampling parameters, which carry what the front end resolved."""
        carried = carried_by(params)
        for part in self._parts:
            part.enter(request_id, carried)

    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch, finished or preempted; its KV blocks are still its own."""
        for part in self._parts:
            part.leave(request_id)

    def set_rows(self, request_ids: Sequence[str], first: Sequence[int], last: Sequence[int]) -> None:
        """The coming step's batch: per row, the positions of the first and the last token that it processes."""
        if self.slots is not None:
            self.slots.set_rows(request_ids, last)
        if self.explicit is not None:
            self.explicit.set_rows(request_ids, first, last)

    @property
    def _parts(self) -> list[StateSlots | ExplicitMemory]:
        return [part for part in (self.slots, self.explicit) if part is not None]


def attach_memory(
    vllm_config: VllmConfig, model: nn.Module, config: MemTritonConfig, block_row: BlockRow
) -> WorkerMemory:
    """Give a loaded model the memory that its configuration asks for. Raises ConfigError naming what does not fit.

    block_row: reads a running request's row of the engine's block table.
    """
    invariant = config.deterministic or envs.VLLM_BATCH_INVARIANT
    slots = attach(vllm_config, model, config.delta) if config.delta is not None else None
    if slots is not None:
        slots.batch_invariant = invariant
    if config.memory is None:
        return WorkerMemory(slots)
    from mem_triton_vllm.explicit_worker import attach_explicit

    policy = Policy(batch_invariant=True) if invariant else None
    return WorkerMemory(slots, attach_explicit(vllm_config, model, config.memory, block_row, policy))
