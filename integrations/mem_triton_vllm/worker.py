"""The worker method that hands a finished request's state to the front end.

vLLM calls worker methods by name over its collective RPC; its plugin guide has plugins add theirs to ``WorkerBase``.
The method exists only in processes that loaded a model with memory.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from mem_triton.runtime.slots import StateSlots
from mem_triton_vllm.front_end import TAKE_STATE


def take_state(self: WorkerBase, lease: str, position: int, forget: list[str]) -> dict[str, Any]:
    """This worker's layers of a lease's state after ``position``: {"position": int, "states": {index: fp32 bytes}}."""
    slots: StateSlots = self.get_model().mem_triton_slots
    slots.drop(forget)
    reached, data = slots.take(lease, position)
    size = 4 * slots.state_size
    parts = {str(layer): data[i * size : (i + 1) * size] for i, layer in enumerate(slots.layer_indices)}
    return {"position": reached, "states": parts}


def install() -> None:
    """Add the method to vLLM's workers in this process."""
    setattr(WorkerBase, TAKE_STATE, take_state)
