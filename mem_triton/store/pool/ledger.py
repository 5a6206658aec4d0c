"""Keeps which entry lies in which pages of a tier, who needs it, and who makes room. No tensors, no threads."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from mem_triton.store.pool import metrics


@dataclass
class LedgerEntry:
    """pages: in order. tokens: it fills so many of them. owners: who needs it; it stays while there are any."""

    pages: tuple[int, ...]
    tokens: int
    ready: bool = False
    owners: set[str] = field(default_factory=set)


class PageLedger:
    """Assigns ``num_pages`` pages of ``page_bytes`` of a tier; the least recently used entry without owner is evicted.

    entries: by reference. An entry is reserved, then filled, then ready; until it is, its pages are not given away.
    Not thread-safe: its user holds a lock. Example::

        ledger = PageLedger(num_pages=8, page_bytes=4096, tier="device")
        pages = ledger.reserve("alice@1", count=2, tokens=11)      # (0, 1)
        ledger.pin("alice@1", "request-7")
        ledger.fill("alice@1")
        ledger.unpin("alice@1", "request-7")                       # stays until somebody needs the room
    """

    def __init__(self, num_pages: int, page_bytes: int, tier: str) -> None:
        self.num_pages, self.page_bytes, self.tier = num_pages, page_bytes, tier
        self.entries: dict[str, LedgerEntry] = {}
        self.evictions = 0
        self.idle_pages = 0
        self._free = list(range(num_pages))  # a heap: the lowest pages first, so that entries get neighbours
        self._idle: OrderedDict[str, None] = OrderedDict()  # entries that may go, least recently used first

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def pinned_pages(self) -> int:
        """Pages of entries that have an owner."""
        return sum(len(e.pages) for e in self.entries.values() if e.owners)

    def is_ready(self, ref: str) -> bool:
        """Whether the entry's pages are filled."""
        return ref in self.entries and self.entries[ref].ready

    def room(self, besides: Iterable[str] = ()) -> int:
        """Pages that can be had, evicting whatever may go except the entries ``besides``."""
        kept = sum(len(self.entries[ref].pages) for ref in besides if ref in self._idle)
        return self.free_pages + self.idle_pages - kept

    def reserve(self, ref: str, count: int, tokens: int) -> tuple[int, ...]:
        """Pages for a new entry. There must be ``room`` for them; entries that are kept must be pinned."""
        while self.free_pages < count:
            self._evict()
        pages = tuple(heapq.heappop(self._free) for _ in range(count))
        self.entries[ref] = LedgerEntry(pages, tokens)
        metrics.POOL_USED_BYTES.labels(self.tier).inc(count * self.page_bytes)
        return pages

    def fill(self, ref: str) -> None:
        """The entry's pages are filled."""
        self.entries[ref].ready = True
        self._settle(ref)

    def drop(self, ref: str) -> None:
        """Remove the entry with all its owners; its pages are free."""
        entry = self.entries.pop(ref)
        if ref in self._idle:
            del self._idle[ref]
            self.idle_pages -= len(entry.pages)
        for page in entry.pages:
            heapq.heappush(self._free, page)
        metrics.POOL_USED_BYTES.labels(self.tier).dec(len(entry.pages) * self.page_bytes)

    def pin(self, ref: str, owner: str) -> None:
        """``owner`` needs the entry."""
        self.entries[ref].owners.add(owner)
        self._settle(ref)

    def unpin(self, ref: str, owner: str) -> bool:
        """``owner`` no longer does; False if it never did, or the entry is gone."""
        entry = self.entries.get(ref)
        if entry is None or owner not in entry.owners:
            return False
        entry.owners.remove(owner)
        self._settle(ref)
        return True

    @staticmethod
    def _may_go(entry: LedgerEntry) -> bool:
        return entry.ready and not entry.owners

    def _settle(self, ref: str) -> None:
        """Keep the list of entries that may go; one that was just used goes last."""
        entry = self.entries[ref]
        if ref in self._idle:
            del self._idle[ref]
            self.idle_pages -= len(entry.pages)
        if self._may_go(entry):
            self._idle[ref] = None
            self.idle_pages += len(entry.pages)

    def _evict(self) -> None:
        self.drop(next(iter(self._idle)))
        self.evictions += 1
        metrics.POOL_EVICTIONS.labels(self.tier).inc()
