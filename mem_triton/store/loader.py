"""Fills a pool's pages in the background: from the host's cache of what left the device, or from the bank on disk.

A worker is told which entry goes into which pages (``runtime.residency`` decides); it starts the load, goes on with its
steps, and says later what has been filled. On a GPU the copies run on a stream of their own, which first waits for the
steps that may still read what lay in the pages before.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mem_triton.runtime import counters
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool import Packed, PagePool


class PageLoader:
    """Loads entries into ``pool``. read: gives an entry placed for this worker (its layers, heads and positions).

    host_bytes: size of the host's cache of entries in the pool's own form; the least recently used one leaves it.

    Example::

        loader.load("alice@1", pages=[3, 9])
        ...
        loader.finished()                         # {"alice@1": None}, or the error's text instead of None
    """

    def __init__(
        self, pool: PagePool, read: Callable[[str], MemoryBlock], host_bytes: int = 0, workers: int = 2
    ) -> None:
        self._pool, self._read, self._host_bytes = pool, read, host_bytes
        self._host: OrderedDict[str, Packed] = OrderedDict()  # least recently used first
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="mem_triton-load")
        self._finished: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

    def load(self, ref: str, pages: Sequence[int]) -> None:
        """Start to fill ``pages`` with an entry; returns at once. What lay in them before is nobody's any more."""
        before = None
        if self._stream is not None:
            before = torch.cuda.Event()
            before.record()  # the steps queued so far may still read these pages
        self._threads.submit(self._fill, ref, list(pages), before)

    def finished(self) -> dict[str, str | None]:
        """Entries filled since the last call, each with None, or with the reason why it could not be loaded."""
        with self._lock:
            finished, self._finished = self._finished, {}
            return finished

    def close(self) -> None:
        """Wait for what is under way, and stop."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fill(self, ref: str, pages: list[int], before: Any) -> None:
        error = None
        try:
            packed = self._packed(ref)
            if self._stream is None:
                self._pool.write(pages, packed)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(before)
                    self._pool.write(pages, packed)
                self._stream.synchronize()  # this thread waits; the steps go on
        except Exception as problem:  # whatever it is, the worker lives on and the request hears of it
            error = f"{type(problem).__name__}: {problem}"
        with self._lock:
            self._finished[ref] = error

    def _packed(self, ref: str) -> Packed:
        """The entry in the pool's own form, from the host's cache if it is there."""
        with self._lock:
            if ref in self._host:
                self._host.move_to_end(ref)
                counters.POOL_HITS.labels("host").inc()
                return self._host[ref]
        counters.POOL_MISSES.labels("host").inc()
        packed = self._pool.pack(self._read(ref))
        with self._lock:
            self._host[ref] = packed
            held = sum(p.nbytes for p in self._host.values())
            while held > self._host_bytes:
                _, evicted = self._host.popitem(last=False)
                held -= evicted.nbytes
                counters.POOL_EVICTIONS.labels("host").inc()
        return packed
