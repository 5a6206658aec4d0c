"""The worker methods that the front end calls: a finished request's state, pages to fill, prompts that were kept.

vLLM calls worker methods by name over its collective RPC; its plugin guide has plugins add theirs to ``WorkerBase``.
The methods exist only in processes that loaded a model with memory. None of them waits: vLLM's engine waits for them.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from mem_triton.store.pool.courier import Order
from mem_triton_vllm import front_end
from mem_triton_vllm.worker_memory import WorkerMemory


def _memory(worker: WorkerBase) -> WorkerMemory:
    return worker.get_model().mem_triton


def take_state(self: WorkerBase, lease: str, position: int, forget: list[str]) -> dict[str, Any]:
    """This worker's layers of a lease's state after ``position``: {"position": int, "states": {index: fp32 bytes}}."""
    slots = _memory(self).slots
    slots.drop(forget)
    reached, data = slots.take(lease, position)
    size = 4 * slots.state_size
    parts = {str(layer): data[i * size : (i + 1) * size] for i, layer in enumerate(slots.layer_indices)}
    return {"position": reached, "states": parts}


def load_pages(self: WorkerBase, orders: list[Order]) -> None:
    """Start to fill pages in the background."""
    for ref, pages, _ in orders:
        _memory(self).explicit.load(ref, pages)


def pages_state(self: WorkerBase, heard: list[str]) -> dict[str, dict[str, Any]]:
    """What has been filled, less what the front end has ``heard``: reference -> None, or why it could not be; and the
    loader's counts."""
    loader = _memory(self).explicit.loader
    return {"finished": loader.outcomes(heard), "stats": loader.stats()}


def capture_state(self: WorkerBase, lease: str) -> dict[str, Any]:
    """{"file": path} of this worker's layers and heads of a kept prompt, {"error": reason}, {} while it is written."""
    try:
        return _memory(self).explicit.captures.state(lease)
    except KeyError as error:
        return {"error": str(error)}


def drop_captures(self: WorkerBase, leases: list[str]) -> None:
    """Forget captures; nothing of them stays here or on the disk."""
    _memory(self).explicit.captures.drop(leases)


def install() -> None:
    """Add the methods to vLLM's workers in this process."""
    methods = {
        front_end.TAKE_STATE: take_state,
        front_end.LOAD_PAGES: load_pages,
        front_end.PAGES_STATE: pages_state,
        front_end.CAPTURE_STATE: capture_state,
        front_end.DROP_CAPTURES: drop_captures,
    }
    for name, method in methods.items():
        setattr(WorkerBase, name, method)
