"""What a scheduler process answers to the front end's calls over the channel.

The calls come in on the channel's thread; what they may touch between two forward passes, a part touches inside
``WorkerHost.exclusive``.
"""

from __future__ import annotations

from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton_sglang.channel import serve

CALL = "call"
"""Name of the handler: (system, method, *args) as in ``BatchMemory.call``."""


def serve_memory(memory: BatchMemory, rank: int) -> None:
    """Answer calls from now on, in a thread that ends with the process."""
    serve(rank, {CALL: memory.call})
