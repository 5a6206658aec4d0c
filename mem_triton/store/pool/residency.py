"""Decides which entries are on the device, for whom, and in which pages: the front end's view of the pool.

The front end alone decides, as it does for sessions; workers load what they are told into the pages they are told. So
every rank holds the same entry in the same pages, a hit costs no message at all, and a request reaches the scheduler
only when its pages are filled: one that waits for a disk delays nobody else.

Example::

    ticket = residency.request("request-7", {"alice@1": 128})
    for load in residency.take_loads():
        ...                                   # tell the workers; later residency.loaded(load.ref)
    assert ticket.state == "ready"
    residency.release("request-7")            # the pages stay filled until somebody needs the room
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from mem_triton.store.pool import metrics
from mem_triton.store.pool.ledger import PageLedger
from mem_triton.store.pool.page_load import PageLoad


class PoolCapacityError(ValueError):
    """A request that could never fit, whatever was evicted."""


@dataclass
class Ticket:
    """A request's claim on its entries. state: "ready", "loading", "waiting" for free pages, or "failed: reason".

    failed: the entry that could not be loaded.
    """

    owner: str
    tokens: Mapping[str, int]  # ref -> tokens
    state: str = "waiting"
    failed: str | None = None
    pages: dict[str, tuple[int, ...]] = field(default_factory=dict)  # ref -> its pages in order


class Residency:
    """Pages of one pool: reference counts pin them, the least recently used unpinned entry makes room.

    num_pages: pages of the pool; page_tokens: tokens of one; page_bytes: for the metrics. listener: called, in whatever
    thread, when a release has given pages to tickets that waited. Thread-safe; does no input or output of its own.
    """

    def __init__(self, num_pages: int, page_tokens: int, page_bytes: int = 0) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._ledger = PageLedger(num_pages, page_bytes, "device")
        self._tickets: dict[str, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self._loads: dict[str, PageLoad] = {}  # that the workers have to be told of
        self._lock = threading.Lock()
        self.listener: Callable[[], None] = lambda: None

    def pages_for(self, tokens: int) -> int:
        """Pages that an entry of so many tokens takes."""
        return -(-tokens // self.page_tokens)

    def request(self, owner: str, tokens: Mapping[str, int]) -> Ticket:
        """Claim entries (ref -> tokens) for ``owner``, who must be new. Raises PoolCapacityError if they never fit."""
        with self._lock:
            needed, kept = sum(map(self.pages_for, tokens.values())), self._pages_kept_from(tokens)
            if needed > self.num_pages - kept:
                raise PoolCapacityError(
                    f"needs {needed} memory pages, the pool has {self.num_pages - kept}; "
                    "name fewer entries, or serve with a larger mem_triton.memory.pool_gib"
                )
            if owner in self._tickets:
                raise ValueError(f"{owner} has a ticket already; release it first")
            ticket = self._tickets[owner] = Ticket(owner, dict(tokens))
            for ref in tokens:
                (metrics.POOL_HITS if ref in self._ledger.entries else metrics.POOL_MISSES).labels("device").inc()
            if not self._admit(ticket):
                self._waiting.append(ticket)
            self._show()
            return ticket

    def pin(self, tokens: Mapping[str, int]) -> Ticket:
        """Claim entries until the engine ends."""
        return self.request(_PINNED, tokens)

    def take_loads(self) -> list[PageLoad]:
        """Return the loads that no order has gone out for; each is returned once."""
        with self._lock:
            loads, self._loads = self._loads, {}
            return list(loads.values())

    def put_back(self, loads: Iterable[PageLoad]) -> None:
        """Return loads whose orders did not arrive to the head of the queue."""
        with self._lock:
            self._loads = {load.ref: load for load in loads} | self._loads

    def loaded(self, ref: str) -> None:
        """The workers have filled this entry's pages."""
        with self._lock:
            self._ledger.fill(ref)
            for owner in self._ledger.entries[ref].owners:
                self._settle(self._tickets[owner])
            self._admit_waiting()

    def failed(self, ref: str, reason: str) -> None:
        """The workers could not load it: its tickets fail, its pages are free, the next request tries again."""
        with self._lock:
            for owner in self._ledger.entries[ref].owners:
                ticket = self._tickets[owner]
                ticket.state, ticket.failed = f"failed: {ref}: {reason}", ref
            self._ledger.drop(ref)
            self._admit_waiting()

    def release(self, owner: str, forget: Iterable[str] = ()) -> None:
        """The owner is done; harmless if it has no ticket. forget: entries of its own, which nobody asks for again."""
        with self._lock:
            ticket = self._tickets.pop(owner, None)
            if ticket is None:
                return
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            for ref in ticket.tokens:
                self._ledger.unpin(ref, owner)
            for ref in forget:
                if (entry := self._ledger.entries.get(ref)) is not None and not entry.owners:
                    self._ledger.drop(ref)
                    self._loads.pop(ref, None)
            admitted = self._admit_waiting()
        if admitted:
            self.listener()

    def _pages_kept_from(self, tokens: Mapping[str, int]) -> int:
        """Pages that stay with entries pinned for ever, which are not among ``tokens``."""
        entries = self._ledger.entries.items()
        return sum(len(e.pages) for ref, e in entries if _PINNED in e.owners and ref not in tokens)

    def _admit(self, ticket: Ticket) -> bool:
        """Give the ticket all its pages, or none."""
        ledger = self._ledger
        missing = {ref: self.pages_for(n) for ref, n in ticket.tokens.items() if ref not in ledger.entries}
        if missing and self._waiting and self._waiting[0] is not ticket:
            return False  # first come, first served
        if ledger.room(besides=ticket.tokens.keys() - missing) < sum(missing.values()):
            return False
        for ref in ticket.tokens.keys() - missing:  # before room is made for the others
            ledger.pin(ref, ticket.owner)
        for ref, count in missing.items():
            pages = ledger.reserve(ref, count, ticket.tokens[ref])
            ledger.pin(ref, ticket.owner)
            self._loads[ref] = PageLoad(ref, pages, ticket.tokens[ref])
        ticket.pages = {ref: ledger.entries[ref].pages for ref in ticket.tokens}
        self._settle(ticket)
        return True

    def _admit_waiting(self) -> bool:
        """Give free pages to those who wait, first come, first served; whether anybody got some."""
        before = len(self._waiting)
        while self._waiting and self._admit(self._waiting[0]):
            self._waiting.popleft()
        self._show()
        return len(self._waiting) < before

    def _show(self) -> None:
        metrics.POOL_WAITING.set(len(self._waiting))
        metrics.POOL_PINNED_PAGES.set(self._ledger.pinned_pages)

    def _settle(self, ticket: Ticket) -> None:
        if not ticket.state.startswith("failed"):
            ticket.state = "ready" if all(map(self._ledger.is_ready, ticket.tokens)) else "loading"


_PINNED = "the engine"
