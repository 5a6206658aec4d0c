"""Finds a worker's memory on the loaded model, which runners and worker methods have in common."""

from __future__ import annotations

from typing import Any

from mem_triton.runtime.worker.memory import BatchMemory


def give(model: Any, memory: BatchMemory) -> None:
    """The model has memory from now on."""
    model.mem_triton = memory


def memory_of(model: Any) -> Any:
    """What the model was given, ``worker.VLLMWorkerMemory``; None without memory, or before it is attached."""
    return getattr(model, "mem_triton", None)
