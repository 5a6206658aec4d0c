"""The worker method that the front end calls.

vLLM calls worker methods by name over its collective RPC; its plugin guide has plugins add theirs to ``WorkerBase``.
The method exists only in processes that loaded a model with memory. Nothing behind it waits: vLLM's engine does.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

CALL = "mem_triton_call"
"""Name of the worker method, for ``collective_rpc``: (system, method, *args) as in ``BatchMemory.call``."""


def call(self: WorkerBase, system: str, method: str, *args: Any) -> Any:
    """Hand a call to a memory system's part in this worker."""
    return self.get_model().mem_triton.call(system, method, *args)


def install() -> None:
    """Add the method to vLLM's workers in this process."""
    setattr(WorkerBase, CALL, call)
