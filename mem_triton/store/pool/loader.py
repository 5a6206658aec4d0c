"""Fills the pages that a worker is told to fill, in the background (``fetching``), and says later what has been filled.

Which entry goes into which pages is decided by the front end (``store.pool.residency``), for all workers alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.fetching import Fetch, Fetcher
from mem_triton.store.pool.pool import PagePool


class PageLoader:
    """Loads entries into ``pool``. read: gives an entry placed for this worker (its layers, heads and positions).

    host_bytes: of the host's cache of entries that left the device. workers: threads that read from disk.

    Example::

        loader.load("alice@1", pages=[3, 9])
        ...
        loader.outcomes()                         # {"alice@1": None}, or the error's text instead of None
        loader.outcomes(heard=["alice@1"])        # {}
    """

    def __init__(
        self, pool: PagePool, read: Callable[[str], MemoryBlock], host_bytes: int = 0, workers: int = 2
    ) -> None:
        self._fetches: dict[str, Fetch] = {}  # reference -> its fetch, under way, or over and not heard of yet
        self._copied: list[Any] = []  # finished copies that the steps' stream is not ordered behind yet
        self._lock = threading.Lock()
        self._fetcher = Fetcher(pool, read, over=self._over, host_bytes=host_bytes, workers=workers)

    def load(self, ref: str, pages: Sequence[int]) -> None:
        """Start to fill ``pages`` with an entry; returns at once. What lay in them before is nobody's any more.

        An order that is under way already changes nothing. Called in the thread that queues the engine's steps: the
        copy comes after those that are queued.
        """
        with self._lock:
            before = self._fetches.get(ref)
            if before is not None and not before.over and before.pages == tuple(pages):
                return
            fetch = self._fetches[ref] = Fetch(ref, tuple(pages), after=[self._fetcher.copies.mark()])
        self._fetcher.start(fetch)

    def before_step(self) -> None:
        """Order the coming step, on a GPU, behind what has been copied; never behind a copy that is under way."""
        if self._copied:
            with self._lock:
                copied, self._copied = self._copied, []
            self._fetcher.copies.join(copied)

    def outcomes(self, heard: Iterable[str] = ()) -> dict[str, str | None]:
        """Entries that were filled, each with None, or with the reason why it could not be loaded.

        heard: those that the caller knows of; they are forgotten, all others are said again next time.
        """
        with self._lock:
            over = {ref: fetch.error for ref, fetch in self._fetches.items() if fetch.over}
            for ref in over.keys() & set(heard):
                del self._fetches[ref], over[ref]
            return over

    def finished(self) -> dict[str, str | None]:
        """``outcomes``, each handed out once: for callers in the same process, whose calls cannot get lost."""
        finished = self.outcomes()
        self.outcomes(heard=finished)
        return finished

    def stats(self) -> dict[str, int]:
        """Counts since the start: "hits.host", "misses.host", "bytes.disk", "evictions.host", ..."""
        return self._fetcher.stats()

    def close(self) -> None:
        """Stop; what has not begun is dropped."""
        self._fetcher.close()

    def _over(self, fetch: Fetch) -> None:
        with self._lock:
            fetch.over = True
            if fetch.copied is not None:
                self._copied.append(fetch.copied)
