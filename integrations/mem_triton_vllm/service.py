"""The worker method that says how far a worker is: vLLM calls it between the steps planned before and after.

All other calls go past the engine (``mem_triton.runtime.channel``). vLLM calls worker methods by name over its
collective RPC; its plugin guide has plugins add theirs to ``WorkerBase``. The method exists only in processes that
loaded a model with memory.
"""

from __future__ import annotations

from vllm.v1.worker.worker_base import WorkerBase

BARRIER = "mem_triton_barrier"
"""Name of the worker method, for ``collective_rpc``."""


def barrier(self: WorkerBase) -> None:
    """Answers when this worker has begun all steps that were planned before."""


def install() -> None:
    """Add the method to vLLM's workers in this process."""
    setattr(WorkerBase, BARRIER, barrier)
