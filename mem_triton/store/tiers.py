"""Device pages above a host cache above a bank on disk, for one process that decides and fetches by itself.

Whoever reads an entry owns it until the release, and pages that somebody owns are never given away. Fetches run in the
background (``store.fetching``) and are shared: an entry is fetched once, however many need it. Hits are ready at once,
whatever else is being fetched. Why pages that are given away are safe on a GPU: see ``store.streams``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

from mem_triton.store import metrics
from mem_triton.store.block import MemoryBlock
from mem_triton.store.fetching import Fetch, Fetcher
from mem_triton.store.ledger import PageLedger
from mem_triton.store.pages import PageRun
from mem_triton.store.pool import PagePool

State = Literal["ready", "loading", "waiting", "failed"]
GIB = 1 << 30
FOR_EVER = "for ever"
"""Owner of what ``pin`` keeps on the device."""


class PoolCapacityError(ValueError):
    """A request that could never fit, whatever was evicted. needed, available: pages."""

    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


class Ticket:
    """An owner's claim on entries. sizes: reference -> tokens. error: the text of what made it fail.

    "ready": all pages are filled, and stay so until the release. "loading": they are being filled. "waiting": all pages
    are owned by others; first come, first served. "failed": it holds none of them any more.
    """

    def __init__(self, owner: str, sizes: dict[str, int]) -> None:
        self.owner, self.sizes = owner, sizes
        self.error: str | None = None
        self._state: State = "waiting"
        self._settled = threading.Event()

    def state(self) -> State:
        """Where it stands now."""
        return self._state

    def wait(self, timeout: float | None = None) -> State:
        """``state`` as soon as it is "ready" or "failed", or after ``timeout`` seconds."""
        self._settled.wait(timeout)
        return self._state

    def _become(self, state: State, error: str | None = None) -> None:
        self._state, self.error = state, error
        if state in ("ready", "failed"):
            self._settled.set()


class MemoryTiers:
    """See the module. Thread-safe; no lock is held while something is read, packed or copied.

    load: an entry's block from disk. place: that block with its keys rotated to where they are read. tokens: an
    entry's tokens per head, without reading it. host_bytes: of the host cache, page-locked on a GPU and allocated here;
    it keeps placed entries as pages, and the least recently used ones go. workers: threads that read from disk.

    Example::

        tiers = MemoryTiers(pool, bank.load, lambda block: place(block, ropes, "memory3", 128),
                            tokens=lambda ref: bank.resolve(ref, any_tenant=True).tokens, host_bytes=4 << 30)
        ticket = tiers.request(["alice@1", "paris@3"], owner="request-7")
        ...                                               # until ticket.state() == "ready"
        tiers.before_step()                               # in the thread, and with the stream, that queues steps
        tiers.run_of("alice@1").pages
        tiers.release("request-7")                        # there, too, once its last step is queued
    """

    def __init__(
        self,
        pool: PagePool,
        load: Callable[[str], MemoryBlock],
        place: Callable[[MemoryBlock], MemoryBlock],
        *,
        tokens: Callable[[str], int],
        host_bytes: int = 0,
        workers: int = 2,
    ) -> None:
        self._layout, self._tokens = pool.layout, tokens
        self._device = PageLedger(pool.num_pages, pool.layout.page_bytes, "device")
        self._tally = metrics.Tally()
        self._lock, self._closed = threading.Lock(), False
        self._tickets: dict[str, list[Ticket]] = {}  # by owner
        self._waiting: deque[Ticket] = deque()
        self._readers: dict[int, Any] = {}  # page -> mark of the steps queued when it was last released
        self._copied: list[Any] = []  # finished copies that the steps' stream is not ordered behind yet
        self._shown = (0, 0)
        self._fetcher = Fetcher(
            pool, lambda ref: place(load(ref)), wanted=self._is_wanted, over=self._end,
            host_bytes=host_bytes, workers=workers,
        )  # fmt: skip

    def request(self, refs: Iterable[str], owner: str) -> Ticket:
        """Claim entries for ``owner``, besides what it owns already; returns at once.

        A ticket gets all its pages or waits without holding any. Raises PoolCapacityError if they can never fit, and
        whatever ``tokens`` raises for an unknown reference.
        """
        ticket = Ticket(owner, {ref: self._tokens(ref) for ref in dict.fromkeys(refs)})
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed; nothing can be requested any more")
            self._check_capacity(ticket)
            self._tickets.setdefault(owner, []).append(ticket)
            if not self._admit(ticket):
                self._waiting.append(ticket)
            self._show()
        return ticket

    def pin(self, refs: Iterable[str]) -> Ticket:
        """Claim entries until ``close``: those that every request reads."""
        return self.request(refs, FOR_EVER)

    def release(self, owner: str) -> None:
        """The owner is done; harmless if it owns nothing. Its pages stay filled until somebody needs the room.

        On a GPU call it with the stream current on which the owner's last step was queued: the pages are overwritten
        only behind that. A fetch that nobody else needs is dropped if it has not begun.
        """
        with self._lock:
            if owner not in self._tickets:
                return
        mark = self._fetcher.copies.mark()
        with self._lock:
            for ticket in self._tickets.pop(owner, ()):
                if ticket.state() == "waiting":
                    self._waiting.remove(ticket)
                if ticket.state() in ("waiting", "loading"):
                    ticket._become("failed", "released before it was ready")
                for ref in ticket.sizes:
                    if self._device.unpin(ref, owner) and mark is not None:
                        self._readers.update((page, mark) for page in self._device.entries[ref].pages)
            self._admit_waiting()

    def run_of(self, ref: str) -> PageRun:
        """Where a resident entry lies; own it before. Raises KeyError if its pages are not filled."""
        with self._lock:
            if not self._device.is_ready(ref):
                raise KeyError(f"{ref} is not on the device; request it and wait for its ticket")
            entry = self._device.entries[ref]
            return PageRun(entry.pages, self._layout.tokens_in_pages(entry.tokens))

    def before_step(self) -> None:
        """Order the current stream behind the copies that are finished. Waits for nothing."""
        with self._lock:
            copied, self._copied = self._copied, []
        self._fetcher.copies.join(copied)

    def stats(self) -> dict[str, int]:
        """Counts since the start ("hits.device", "bytes.disk", ...) and pages now ("used.host", "pinned.device")."""
        with self._lock:
            device = self._device
            counts = {**self._tally.counts, "evictions.device": device.evictions, "pinned.device": device.pinned_pages}
            counts["used.device"] = device.num_pages - device.free_pages
        return {**counts, **self._fetcher.stats()}

    def close(self, timeout: float = 5.0) -> None:
        """Fail every ticket that is not ready, drop what has not begun and stop the threads; see ``Fetcher.close``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for ticket in (t for tickets in self._tickets.values() for t in tickets):
                if ticket.state() != "ready":
                    ticket._become("failed", "the pool was closed")
            self._waiting.clear()
        self._fetcher.close(timeout)
        with self._lock:
            for ref in list(self._device.entries):
                self._device.drop(ref)
            self._show()

    # Decisions; the lock is held.

    def _check_capacity(self, ticket: Ticket) -> None:
        """Raise PoolCapacityError if the ticket cannot fit beside the other claims of its owner and the defaults."""
        others = (*self._tickets.get(ticket.owner, ()), *self._tickets.get(FOR_EVER, ()))
        held = {ref: self._layout.pages_for(n) for t in others if t is not ticket for ref, n in t.sizes.items()}
        needed = {ref: self._layout.pages_for(n) for ref, n in ticket.sizes.items() if ref not in held}
        total, available = sum(needed.values()), self._device.num_pages - sum(held.values())
        if total > available:
            gib = (total + sum(held.values())) * self._layout.page_bytes / GIB
            raise PoolCapacityError(
                f"{', '.join(needed)}: needs {total} memory pages of {self._layout.page_tokens} tokens, "
                f"{available} of the pool's {self._device.num_pages} can be had; name fewer entries, or serve with a "
                f"mem_triton.memory.pool_gib of at least {gib:.3g}", total, available,
            )  # fmt: skip

    def _is_coming(self, ref: str) -> bool:
        """Whether nobody needs to fetch it: it is there, or under way."""
        return ref in self._device.entries

    def _admit(self, ticket: Ticket) -> bool:
        """Give the ticket all pages that it lacks and start to fill them, or do nothing."""
        there = [ref for ref in ticket.sizes if self._is_coming(ref)]
        missing = {ref: self._layout.pages_for(n) for ref, n in ticket.sizes.items() if ref not in there}
        if missing and self._waiting and self._waiting[0] is not ticket:
            return False  # small requests do not overtake a big one for ever
        if sum(missing.values()) > self._device.room(besides=there):
            return False
        for ref in there:
            self._device.pin(ref, ticket.owner)
            self._tally.add(metrics.POOL_HITS, "hits", "device")
        for ref, count in missing.items():
            self._tally.add(metrics.POOL_MISSES, "misses", "device")
            pages = self._device.reserve(ref, count, ticket.sizes[ref])
            self._device.pin(ref, ticket.owner)
            marks = {id(mark): mark for page in pages if (mark := self._readers.get(page)) is not None}
            self._fetcher.start(Fetch(ref, pages, tuple(marks.values())))
        ticket._become("loading")
        self._settle(ticket)
        return True

    def _admit_waiting(self) -> None:
        for ticket in list(self._waiting):
            try:
                self._check_capacity(ticket)  # the defaults may have grown since it came
                if self._admit(ticket):
                    self._waiting.remove(ticket)
            except PoolCapacityError as error:
                self._waiting.remove(ticket)
                self._fail(ticket, str(error))
        self._show()

    def _fail(self, ticket: Ticket, error: str) -> None:
        """The ticket holds nothing any more; what else its owner claims stays."""
        ticket._become("failed", error)
        claims = self._tickets[ticket.owner]
        claims.remove(ticket)
        for ref in ticket.sizes:
            if not any(ref in other.sizes for other in claims):
                self._device.unpin(ref, ticket.owner)
        if not claims:
            del self._tickets[ticket.owner]

    def _settle(self, ticket: Ticket) -> None:
        if ticket.state() == "loading" and all(map(self._device.is_ready, ticket.sizes)):
            ticket._become("ready")

    def _show(self) -> None:
        shown = self._device.pinned_pages, len(self._waiting)
        metrics.POOL_PINNED_PAGES.inc(shown[0] - self._shown[0])
        metrics.POOL_WAITING.inc(shown[1] - self._shown[1])
        self._shown = shown

    # What the fetcher's threads call.

    def _is_wanted(self, fetch: Fetch) -> bool:
        """Whether somebody still needs the entry; if not, its pages are free again."""
        with self._lock:
            if self._device.entries[fetch.ref].owners:
                return True
            self._device.drop(fetch.ref)
            self._tally.counts["abandoned"] += 1
            self._admit_waiting()
            return False

    def _end(self, fetch: Fetch) -> None:
        """The entry's pages are filled, or free again."""
        with self._lock:
            if self._closed:
                return
            owners = self._device.entries[fetch.ref].owners
            tickets = [t for owner in owners for t in self._tickets[owner] if fetch.ref in t.sizes]
            if fetch.error is None:
                self._device.fill(fetch.ref)
                if fetch.copied is not None:
                    self._copied.append(fetch.copied)
            else:
                self._device.drop(fetch.ref)
            for ticket in tickets:
                if fetch.error is None:
                    self._settle(ticket)
                elif ticket.state() == "loading":
                    self._fail(ticket, f"{fetch.ref}: {fetch.error}")
            self._admit_waiting()
