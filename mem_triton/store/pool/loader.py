"""Fills the pages that a worker is told to fill, in the background (``fetching``), and says when they are filled.

Which entry goes into which pages is decided by the front end (``store.pool.residency``), for all workers alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.fetching import Fetch, Fetcher
from mem_triton.store.pool.pool import PagePool


class PageLoader:
    """Loads entries into ``pool``. read: gives an entry placed for this worker (its layers, heads and positions).

    host_bytes: of the host's cache of entries that left the device. workers: threads that read from disk.

    Example::

        over = loader.load("alice@1", pages=[3, 9])
        ...
        over.result()                             # None, or the error's text
    """

    def __init__(
        self, pool: PagePool, read: Callable[[str], MemoryBlock], host_bytes: int = 0, workers: int = 2
    ) -> None:
        self._under_way: dict[str, Fetch] = {}  # by reference
        self._copied: list[Any] = []  # finished copies that the steps' stream is not ordered behind yet
        self._lock = threading.Lock()
        self._fetcher = Fetcher(pool, read, over=self._over, host_bytes=host_bytes, workers=workers)

    def load(self, ref: str, pages: Sequence[int]) -> Future[str | None]:
        """Start to fill ``pages`` with an entry; returns at once. What lay in them before is nobody's any more.

        The future is done when they are filled, with None, or with the reason why the entry could not be loaded. An
        order that is under way already changes nothing. Called with the stream of the engine's steps as the current
        one: the copy comes after those that are queued, and none that begins later may read the pages.
        """
        with self._lock:
            before = self._under_way.get(ref)
            if before is not None and before.pages == tuple(pages):
                return before.done
            fetch = self._under_way[ref] = Fetch(ref, tuple(pages), after=[self._fetcher.copies.mark()])
        self._fetcher.start(fetch)
        return fetch.done

    def before_step(self) -> None:
        """Order the coming step, on a GPU, behind what has been copied; never behind a copy that is under way."""
        if self._copied:
            with self._lock:
                copied, self._copied = self._copied, []
            self._fetcher.copies.join(copied)

    def stats(self) -> dict[str, int]:
        """Counts since the start: "hits.host", "misses.host", "bytes.disk", "evictions.host", ..."""
        return self._fetcher.stats()

    def close(self) -> None:
        """Stop; what has not begun is dropped."""
        self._fetcher.close()

    def _over(self, fetch: Fetch) -> None:
        with self._lock:
            if fetch.copied is not None:
                self._copied.append(fetch.copied)
            if self._under_way.get(fetch.ref) is fetch:
                del self._under_way[fetch.ref]
        if not fetch.done.done():  # what fails after its end is said twice
            fetch.done.set_result(fetch.error)
