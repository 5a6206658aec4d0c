"""What a worker process answers to the front end's calls over the channel (``runtime.channel``).

The calls come in on the channel's threads; what they may touch between two forward passes, a part touches inside
``WorkerHost.exclusive``.
"""

from __future__ import annotations

import weakref
from typing import Any

from mem_triton.runtime.channel import CALL, ChannelError, Server, serve
from mem_triton.runtime.worker.memory import BatchMemory


def serve_memory(memory: BatchMemory, rank: int) -> Server:
    """Answer calls from now on, until the memory is gone, or the process."""
    call = weakref.WeakMethod(memory.call)

    def answer(*args: Any) -> Any:
        if (bound := call()) is None:
            raise ChannelError("the engine has ended")
        return bound(*args)

    server = serve(rank, {CALL: answer})
    weakref.finalize(memory, server.close)
    return server
