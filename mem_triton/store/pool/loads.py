"""Carries page loads between the residency and the workers, in an asyncio front end.

The tasks that carry loads belong to no request. Whoever waits for pages only looks at his tickets, when there is news
of any, so that a client who leaves takes no answer with him that others wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from mem_triton import metrics
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.residency import Residency, Ticket


class MemoryLoadError(RuntimeError):
    """An entry's keys and values could not be read; the request that needs them fails, nothing else does."""


LOOK_SECONDS = 0.1
"""How often who waits looks at his deadline, and whether his client is still there; news come by themselves."""
LOAD_SECONDS = 60.0
"""Seconds that a request waits for entries that are being loaded, from the last one that came, before it fails."""

Call = Callable[..., Awaitable[list[Any]]]
"""call(method, *args) -> one answer a worker, once all have answered."""
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
    """Has every load carried out by all workers; one per engine front end.

    call: ``call("load_page", ref, pages, tokens)`` is answered by a worker when its part of the load is over, with
    {"error": None or why it failed, "stats": counts}. An entry is loaded when all workers say so; if one failed, its
    pages are free once all are through with it.

    Example::

        loads = PageLoads(residency, call)
        await loads.wait(lambda: reading.pending)       # MemoryLoadError if an entry cannot be had
    """

    def __init__(self, residency: Residency, call: Call, deadline: float = LOAD_SECONDS) -> None:
        self._residency, self._call, self._deadline = residency, call, deadline
        self._tasks: set[asyncio.Task[None]] = set()
        self._uncalled: dict[str, Exception] = {}  # reference -> why the workers could not be called for it last
        self._news = asyncio.Event()  # another one after each time that it is set
        self._loop: asyncio.AbstractEventLoop | None = None
        residency.listener = self._admitted

    async def wait(self, pending: Callable[[], list[Ticket]], alive: Alive = always) -> None:
        """Wait until none of a request's tickets is pending. alive: looked at now and then.

        Raises MemoryLoadError for entries that cannot be read or do not come within the deadline (waiting for free
        pages has none), and if the workers cannot be called.
        """
        wait = LoadWait(self._deadline)
        while True:
            news = self._news  # before the look, so that no news falls between the two
            if not (tickets := pending()):
                return
            wait.look(tickets)
            await alive()
            self.start()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), LOOK_SECONDS)
            refs = (ref for ticket in pending() for ref in ticket.tokens)
            if error := next((self._uncalled[ref] for ref in refs if ref in self._uncalled), None):
                raise MemoryLoadError(f"failed: its pages could not be loaded: {error}") from error

    def start(self) -> None:
        """Send the orders that the workers have not been given."""
        self._loop = asyncio.get_running_loop()
        for load in self._residency.take_loads():
            self._uncalled.pop(load.ref, None)
            task = self._loop.create_task(self._carry(load), name=f"mem_triton-load-{load.ref}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, load: PageLoad) -> None:
        try:
            answers = await self._call("load_page", *load.order)
        except BaseException as error:  # it is ordered again when somebody waits again
            self._residency.put_back([load])
            if not isinstance(error, Exception):
                raise
            self._uncalled[load.ref] = error
        else:
            _show(answer["stats"] for answer in answers)
            if error := next((answer["error"] for answer in answers if answer["error"]), None):
                self._residency.failed(load.ref, error)
            else:
                self._residency.loaded(load.ref)
        self._wake()

    def _admitted(self) -> None:
        """Tickets have got pages, in whatever thread others were released."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _show(stats: Iterable[dict[str, int]]) -> None:
    """The workers' counts, for ``/metrics``."""
    for worker, counts in enumerate(stats):
        for what, count in counts.items():
            metrics.WORKER_POOL.labels(str(worker), what).set(count)
