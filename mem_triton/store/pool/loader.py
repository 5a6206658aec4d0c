"""Fills the pages that orders name, in the background (``fetching``), and reports when they are filled.

Which entry goes into which pages is decided by the front end (``store.pool.residency``), for all workers alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from mem_triton.store.pool.fetching import Fetcher, Read
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pool import PagePool


def nobody(pages: Sequence[int]) -> Sequence[str]:
    """No request of a batch reads pages, because there is no batch."""
    return ()


class PageLoader:
    """Keeps track of one worker's loads into ``pool``, from the order to the filled pages.

    read: gives an entry placed for this worker (its layers, heads and positions), for a with block. host_bytes: of the
    host's cache of entries that left the device. workers: threads that read from disk. readers: requests of the batch
    that read any of these pages now. Orders, ``retry`` and ``holds`` are called by one thread at a time.

    Example::

        over = loader.load(PageLoad("alice@1", pages=[3, 9], tokens=20))
        ...
        over.result()                             # None, or the error's text
    """

    def __init__(
        self,
        pool: PagePool,
        read: Read,
        host_bytes: int = 0,
        workers: int = 2,
        readers: Callable[[Sequence[int]], Sequence[str]] = nobody,
    ) -> None:
        self._readers = readers
        self._held_back: list[PageLoad] = []  # their pages are still read
        self._under_way: dict[str, PageLoad] = {}  # by reference
        self._ordered: dict[int, str] = {}  # page -> the entry that it was begun to be filled with last
        self._copied: list[Any] = []  # finished copies that the steps' stream is not ordered behind yet
        self._lock = threading.Lock()
        self._fetcher = Fetcher(pool, read, over=self._over, host_bytes=host_bytes, workers=workers)

    def load(self, load: PageLoad) -> Future[str | None]:
        """Start to fill pages with an entry, as soon as no request of the batch reads them; returns at once.

        The front end gives pages away when a request is over for it; the engine may run it a step longer. What lay in
        them before is nobody's any more. The future is done when they are filled, with None, or with the reason why the
        entry could not be loaded. An order that is under way already changes nothing. Called with the stream of the
        engine's steps as the current one: the copy comes after those that are queued, and none that begins later may
        read the pages.
        """
        if self._readers(load.pages):
            self._held_back.append(load)
            return load.over
        self._ordered |= dict.fromkeys(load.pages, load.ref)
        with self._lock:
            before = self._under_way.get(load.ref)
            if before is None or list(before.pages) != list(load.pages):
                before, load.after = None, [self._fetcher.copies.mark()]
                self._under_way[load.ref] = load
        if before is None:
            self._fetcher.start(load)
        else:
            before.over.add_done_callback(lambda over: load.end(over.result()))
        return load.over

    def retry(self) -> None:
        """Start what was held back by requests that have left the batch."""
        held_back, self._held_back = self._held_back, []
        for load in held_back:
            self.load(load)

    def holds(self, ref: str, pages: Sequence[int]) -> bool:
        """Whether these pages were filled with this entry last, or will be."""
        return all(self._ordered.get(page) == ref for page in pages)

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

    def _over(self, load: PageLoad) -> None:
        with self._lock:
            if load.copied is not None:
                self._copied.append(load.copied)
            if self._under_way.get(load.ref) is load:
                del self._under_way[load.ref]
        load.end(load.error)
