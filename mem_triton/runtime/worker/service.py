"""Answers the front end's calls to a worker process, over the channel (``runtime.channel``).

The calls come in on the channel's threads; what they may touch between two forward passes, a part touches inside
``WorkerHost.exclusive``.
"""

from __future__ import annotations

import weakref
from typing import Any

from mem_triton.runtime.channel import CALL, FORGET, LEAVE, OUTCOME, ChannelError, Server, serve
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.runtime.worker.orders import Orders


def serve_memory(memory: BatchMemory, rank: int, orders: Orders | None = None) -> Server:
    """Answer calls from now on, until the memory is gone, or the process. orders: of an engine that needs them."""
    call = weakref.WeakMethod(memory.call)

    def answer(*args: Any) -> Any:
        if (bound := call()) is None:
            raise ChannelError("the engine has ended")
        return bound(*args)

    more = {} if orders is None else {LEAVE: orders.leave, OUTCOME: orders.outcome, FORGET: orders.forget}
    server = serve(rank, {CALL: answer, **more})
    weakref.finalize(memory, server.close)
    return server
