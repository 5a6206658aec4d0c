"""Counts the requests that a LoRA adapter answers, so that no other weights are loaded in its place until they end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable
from weakref import WeakValueDictionary

LONGEST_WAIT = 300.0
"""Seconds that a load waits for the requests in flight."""


class AdapterInUseError(Exception):
    """An adapter that requests in flight still use, so that nothing was loaded in its place."""


class AdapterUsers:
    """Requests in flight, by the engine's key of their adapter.

    Whoever holds ``lock(key)`` changes what answers under the key; no request for it is counted in meanwhile. So a load
    waits for the requests in flight, and those that come later wait for the load.

    Example::

        left = users.enter(key)                # not while users.lock(key).locked()
        ...
        left()
        async with users.lock(key):
            await users.gone(key, "memo")
            ...                                # load others
    """

    def __init__(self, longest_wait: float = LONGEST_WAIT) -> None:
        self.longest_wait = longest_wait
        self._counts: Counter[Hashable] = Counter()
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._gone: dict[Hashable, asyncio.Event] = {}

    def lock(self, key: Hashable) -> asyncio.Lock:
        """The lock under which the adapter of a key is changed: one, as long as somebody holds it or waits for it."""
        if (lock := self._locks.get(key)) is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    def enter(self, key: Hashable) -> Callable[[], None]:
        """Count a request in. Returns what counts it out; harmless twice."""
        self._counts[key] += 1
        inside = True

        def leave() -> None:
            nonlocal inside
            if not inside:
                return
            inside = False
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
                if (gone := self._gone.get(key)) is not None:
                    gone.set()

        return leave

    async def gone(self, key: Hashable, name: str) -> None:
        """Wait until no request uses the adapter. Raises AdapterInUseError behind the longest wait.

        name: the adapter's, for the message.
        """
        if not self._counts[key]:
            return
        self._gone[key] = asyncio.Event()
        try:
            await asyncio.wait_for(self._gone[key].wait(), self.longest_wait)
        except TimeoutError:
            raise AdapterInUseError(in_use(name, self._counts[key])) from None
        finally:
            del self._gone[key]


def in_use(name: str, requests: int) -> str:
    """What is said of an adapter that is in use."""
    return (
        f"mem_triton: the LoRA adapter {name!r} answers {requests} requests, which keep it; nothing was loaded in its "
        "place: try again when they have ended, or load the new one under another name"
    )
