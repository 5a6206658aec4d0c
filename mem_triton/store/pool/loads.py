"""Page loads of an asyncio front end: one task carries them between the residency and the workers.

The task belongs to no request. Whoever waits for pages only looks at his tickets, so that a client who leaves takes
no answer with him that others wait for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mem_triton.store.pool.courier import PageCourier
from mem_triton.store.pool.residency import Residency, Ticket


class MemoryLoadError(RuntimeError):
    """An entry's keys and values could not be read; the request that needs them fails, nothing else does."""


POLL_SECONDS = 0.002
LOAD_SECONDS = 60.0
"""Seconds that a request waits for entries that are being loaded, from the last one that came, before it fails."""

Call = Callable[..., Awaitable[list[Any]]]
"""call(method, *args) -> one answer a worker."""
Alive = Callable[[], Awaitable[None]]
"""Raises what ends a wait: the client has hung up, or the request was aborted."""


async def always() -> None:
    """Ends no wait."""


class LoadWait:
    """One request's wait for its pages: how long nothing has come."""

    def __init__(self, deadline: float = LOAD_SECONDS) -> None:
        self._deadline = deadline
        self._states: list[str] = []
        self._since = time.monotonic()

    def look(self, pending: Sequence[Ticket]) -> None:
        """Look at the tickets that are not ready. Raises MemoryLoadError if one failed or nothing comes any more."""
        if failure := next((t.state for t in pending if t.state.startswith("failed")), None):
            raise MemoryLoadError(failure)
        states, now = [t.state for t in pending], time.monotonic()
        if states != self._states or "loading" not in states:  # free pages are waited for as long as it takes
            self._states, self._since = states, now
        elif now - self._since > self._deadline:
            refs = ", ".join(sorted({ref for t in pending if t.state == "loading" for ref in t.tokens}))
            raise MemoryLoadError(f"failed: {refs}: not loaded within {self._deadline:.0f} s")


class PageLoads:
    """Carries loads for as long as there are any; one per engine front end.

    Example::

        loads = PageLoads(residency, call)
        await loads.wait(lambda: reading.pending)       # MemoryLoadError if an entry cannot be had
    """

    def __init__(self, residency: Residency, call: Call, deadline: float = LOAD_SECONDS) -> None:
        self._courier, self._call, self._deadline = PageCourier(residency), call, deadline
        self._task: asyncio.Task[None] | None = None

    async def wait(self, pending: Callable[[], list[Ticket]], alive: Alive = always) -> None:
        """Wait until none of a request's tickets is pending. alive: looked at in every round.

        Raises MemoryLoadError for entries that cannot be read or do not come within the deadline (waiting for free
        pages has none), and if the workers cannot be called.
        """
        wait = LoadWait(self._deadline)
        while tickets := pending():
            wait.look(tickets)
            await alive()
            task = self.start()
            await asyncio.sleep(POLL_SECONDS)
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise MemoryLoadError(f"failed: its pages could not be loaded: {error}") from error

    def start(self) -> asyncio.Task[None]:
        """The task that carries loads; it ends when there are none."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._carry(), name="mem_triton-loads")
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # waiters hear of it
        return self._task

    async def _carry(self) -> None:
        """Rounds of orders and answers until nothing is under way."""
        while True:
            if orders := self._courier.orders():
                try:
                    await self._call("load_pages", orders)
                except BaseException:  # they are ordered again when somebody waits again
                    self._courier.undelivered(orders)
                    raise
            if not self._courier.busy:
                return
            self._courier.settle(await self._call("pages_state", self._courier.heard()))
            if self._courier.busy:
                await asyncio.sleep(POLL_SECONDS)
