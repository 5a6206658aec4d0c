"""Finds a scheduler process's memory on a runner's model, and on the pool of its requests' rows."""

from __future__ import annotations

from typing import Any

from mem_triton.runtime.worker.memory import BatchMemory


def give(holder: Any, memory: BatchMemory) -> None:
    """The model or the pool has memory from now on."""
    holder.mem_triton = memory


def memory_of(holder: Any) -> Any:
    """What a model or a pool was given, ``worker.SGLangWorkerMemory``; None without a configuration."""
    return getattr(holder, "mem_triton", None)
