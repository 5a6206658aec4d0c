"""Brings entries into device pages in the background, from a host cache of pages or from the bank on disk.

What lies in the host cache has a thread of its own and never queues behind the disk. No lock is held while something is
read, packed or copied.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool import metrics
from mem_triton.store.pool.ledger import PageLedger
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pages import Packed
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.streams import copies_for

logger = logging.getLogger(__name__)

BATCH_BYTES = 8 << 20
"""Host hits that wait together are copied together up to about this size; a fraction of a millisecond on a GPU."""
_COPYING = "copying"
"""Owner of a host entry that is being filled or copied."""


Read = Callable[[str], AbstractContextManager[MemoryBlock]]
"""Gives an entry for a with block, whose end raises if it was damaged."""


class Fetcher:
    """Fetches entries for one pool; at most one load of an entry may be under way.

    read: gives an entry placed for this process (its layers, heads and positions), from disk, for a with block; it is
    packed inside, and used nowhere unless the end of the block finds it undamaged. over: told of each load, once
    its pages are filled or it has failed, from the background. host_bytes: of the host cache, allocated here,
    page-locked if the pool is on a GPU. workers: threads that read from disk, as many slow reads as do not delay
    another.
    """

    def __init__(
        self,
        pool: PagePool,
        read: Read,
        *,
        over: Callable[[PageLoad], None],
        host_bytes: int = 0,
        workers: int = 2,
    ) -> None:
        if workers < 1 or host_bytes < 0:
            raise ValueError(f"workers: {workers} must be at least 1; host_bytes: {host_bytes} must not be negative")
        self.copies = copies_for(pool.device)
        self.tally = metrics.Tally()
        self._pool, self._read, self._over = pool, read, over
        self._host = PageLedger(host_bytes // pool.layout.page_bytes, pool.layout.page_bytes, "host")
        self._on_gpu = pool.device.type == "cuda"
        self._records = pool.layout.empty(self._host.num_pages, pinned=self._on_gpu)
        self._lock, self._closed = threading.Lock(), False
        self._disk_queue: queue.SimpleQueue[PageLoad | None] = queue.SimpleQueue()
        self._host_queue: queue.SimpleQueue[PageLoad | None] = queue.SimpleQueue()
        self._sources = [self._disk_queue] * workers + [self._host_queue]
        self._threads = [
            threading.Thread(target=self._work, args=(source,), name=f"mem_triton-fetch-{i}", daemon=True)
            for i, source in enumerate(self._sources)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, load: PageLoad) -> None:
        """Begin as soon as a thread is free; returns at once."""
        load.began = time.perf_counter()
        with self._lock:
            hit = self._host.is_ready(load.ref)
            if hit:
                self._host.pin(load.ref, _COPYING)
                load.host_pages = self._host.entries[load.ref].pages
            self.tally.add(metrics.POOL_HITS if hit else metrics.POOL_MISSES, "hits" if hit else "misses", "host")
        (self._host_queue if hit else self._disk_queue).put(load)

    def stats(self) -> dict[str, int]:
        """Counts since the start, and the host cache's pages now."""
        with self._lock:
            used = self._host.num_pages - self._host.free_pages
            return {**self.tally.counts, "evictions.host": self._host.evictions, "used.host": used}

    def close(self, timeout: float = 5.0) -> None:
        """Drop what has not begun and wait for the threads. ``over`` is not called any more, but for copies under way.

        A read that is stuck for ``timeout`` seconds is left to its daemon thread; it fills no page when it comes back.
        """
        self._closed = True
        for source in self._sources:
            source.put(None)
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s is still reading after %.1f s and is left behind", thread.name, timeout)
        with self._lock:
            for ref in list(self._host.entries):
                self._host.drop(ref)

    def _work(self, source: queue.SimpleQueue[PageLoad | None]) -> None:
        if self._on_gpu:
            torch.cuda.set_device(self._pool.device)  # a thread's own; else page-locking would touch the first GPU
        while (load := source.get()) is not None:
            batch = [load] + (self._those_behind(load) if source is self._host_queue else [])
            try:
                self._do(batch)
            except Exception as problem:  # the thread lives on: others queue behind it
                logger.exception("mem_triton: entries could not be loaded")
                for load in batch:
                    load.error = f"{type(problem).__name__}: {problem}"
                    self._over(load)

    def _those_behind(self, load: PageLoad) -> list[PageLoad]:
        """Small host hits that wait as well: one copy order and one wait for all of them."""
        batch, pages = [], len(load.pages)
        while pages * self._pool.layout.page_bytes < BATCH_BYTES and not self._host_queue.empty():
            more = self._host_queue.get()  # nobody else takes from this queue
            if more is None:
                self._host_queue.put(None)
                break
            batch.append(more)
            pages += len(more.pages)
        return batch

    def _do(self, batch: Sequence[PageLoad]) -> None:
        begun = [] if self._closed else list(batch)
        self._copy([(load, source) for load in begun if (source := self._source(load)) is not None])
        for load in begun:
            if load.error is None and self._closed:
                continue
            with self._lock:
                self._count(load)
            self._over(load)
        with self._lock:
            for load in batch:
                self._host.unpin(load.ref, _COPYING)

    def _source(self, load: PageLoad) -> tuple[Packed, Sequence[int] | None] | None:
        """Records on the host, and which of them; None if they could not be had."""
        if load.host_pages is not None:
            return self._records, load.host_pages
        try:
            return self._from_disk(load)
        except Exception as problem:  # whatever it is: the thread lives on, and whoever needs the entry hears of it
            load.error = f"{type(problem).__name__}: {problem}"
            return None

    def _copy(self, sources: Sequence[tuple[PageLoad, tuple[Packed, Sequence[int] | None]]]) -> None:
        if self._closed or not sources:
            return

        def write() -> None:
            for load, (packed, rows) in sources:
                self._pool.write(load.pages, packed, rows)

        marks = {id(mark): mark for load, _ in sources for mark in load.after if mark is not None}
        try:
            copied, error = self.copies.run(write, marks.values()), None
        except Exception as problem:
            copied, error = None, f"{type(problem).__name__}: {problem}"
        for load, _ in sources:
            load.copied, load.error = copied, error

    def _count(self, load: PageLoad) -> None:
        self.tally.counts["failed" if load.error else "fetched"] += 1
        if load.error:
            metrics.POOL_FAILURES.inc()
            return
        tier = "disk" if load.host_pages is None else "host"
        self.tally.add(metrics.POOL_BYTES, "bytes", tier, len(load.pages) * self._pool.layout.page_bytes)
        metrics.POOL_FETCH_SECONDS.labels(tier).observe(time.perf_counter() - load.began)

    def _from_disk(self, load: PageLoad) -> tuple[Packed, Sequence[int] | None]:
        """The entry's records, and which of them; in the host cache if there is room."""
        layout, rows = self._pool.layout, None
        try:
            with self._read(load.ref) as block:  # at its end it is known to be undamaged
                if layout.pages_for(block.tokens) != len(load.pages):
                    raise ValueError(f"{block.tokens} tokens on disk, {len(load.pages)} pages were reserved for it")
                rows = self._reserve_on_host(load.ref, len(load.pages), block.tokens)
                packed = layout.pack(block, layout.empty(len(load.pages), pinned=self._on_gpu and rows is None))
            if rows is None:
                return packed, None
            index = torch.tensor(rows)
            for records, part in zip(self._records, packed, strict=True):
                records.index_copy_(0, index, part)
        except BaseException:
            with self._lock:
                if rows is not None:
                    self._host.drop(load.ref)
            raise
        with self._lock:
            self._host.fill(load.ref)
        return self._records, rows

    def _reserve_on_host(self, ref: str, count: int, tokens: int) -> tuple[int, ...] | None:
        with self._lock:
            if self._closed or ref in self._host.entries or self._host.room() < count:
                return None
            rows = self._host.reserve(ref, count, tokens)
            self._host.pin(ref, _COPYING)
            return rows
