"""The worker methods that vLLM calls between the steps planned before and after, on all ranks in one order.

One says how far a worker is, the other carries out what touches the model itself. All other calls go past the engine
(``mem_triton.runtime.channel``). vLLM calls worker methods by name over its collective RPC; its plugin guide has
plugins add theirs to ``WorkerBase``. The methods exist only in processes that loaded a model with memory.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from mem_triton_vllm.held import memory_of

BARRIER, CALL = "mem_triton_barrier", "mem_triton_call"
"""Names of the worker methods, for ``collective_rpc``."""


def barrier(self: WorkerBase) -> None:
    """Answers when this worker has begun all steps that were planned before."""


def call(self: WorkerBase, system: str, method: str, *args: Any) -> Any:
    """Answers a front end's call while no step runs or begins; see ``BatchMemory.call``."""
    memory = memory_of(self.get_model())
    with memory.exclusive():
        return memory.call(system, method, *args)


def install() -> None:
    """Add the methods to vLLM's workers in this process."""
    setattr(WorkerBase, BARRIER, barrier)
    setattr(WorkerBase, CALL, call)
