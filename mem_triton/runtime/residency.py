"""Which entries are on the device, who needs them, and which pages they lie in: the front end's view of the pool.

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
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from mem_triton.runtime import counters
from mem_triton.runtime.tables import PageRun


class PoolCapacityError(ValueError):
    """A request that could never fit, whatever was evicted."""


@dataclass(frozen=True)
class Load:
    """One entry that the workers have to bring into its pages."""

    ref: str
    run: PageRun


@dataclass
class _Entry:
    run: PageRun
    ready: bool = False
    owners: set[str] = field(default_factory=set)


@dataclass
class Ticket:
    """A request's claim on its entries. state: "ready", "loading", "waiting" for free pages, or "failed: reason"."""

    owner: str
    tokens: Mapping[str, int]  # ref -> tokens
    state: str = "waiting"
    runs: dict[str, PageRun] = field(default_factory=dict)


class Residency:
    """Pages of one pool: reference counts pin them, the least recently used unpinned entry makes room.

    num_pages: pages of the pool; page_tokens: tokens of one. Thread-safe; does no input or output of its own.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._free = list(range(num_pages))
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._tickets: dict[str, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self._loads: list[Load] = []
        self._lock = threading.Lock()

    def pages_for(self, tokens: int) -> int:
        """Pages that an entry of so many tokens takes."""
        return -(-tokens // self.page_tokens)

    def request(self, owner: str, tokens: Mapping[str, int]) -> Ticket:
        """Claim entries (ref -> tokens) for ``owner``, who must be new. Raises PoolCapacityError if they never fit."""
        with self._lock:
            pinned = sum(len(e.run.pages) for ref, e in self._entries.items() if _FOREVER in e.owners)
            needed = sum(self.pages_for(n) for ref, n in tokens.items() if not self._is_pinned_for_ever(ref))
            if needed > self.num_pages - pinned:
                raise PoolCapacityError(
                    f"needs {needed} memory pages, the pool has {self.num_pages - pinned}; "
                    "name fewer entries, or serve with a larger mem_triton.memory.pool_gib"
                )
            if owner in self._tickets:
                raise ValueError(f"{owner} has a ticket already; release it first")
            ticket = self._tickets[owner] = Ticket(owner, dict(tokens))
            for ref in tokens:
                hit = ref in self._entries
                (counters.POOL_HITS if hit else counters.POOL_MISSES).labels("device").inc()
            if not self._admit(ticket):
                self._waiting.append(ticket)
            return ticket

    def pin(self, tokens: Mapping[str, int]) -> Ticket:
        """Claim entries for as long as the engine lives."""
        return self.request(_FOREVER, tokens)

    def take_loads(self) -> list[Load]:
        """Loads that nobody has been told of yet; each is handed out once."""
        with self._lock:
            loads, self._loads = self._loads, []
            return loads

    def loaded(self, ref: str) -> None:
        """The workers have filled this entry's pages."""
        with self._lock:
            self._entries[ref].ready = True
            self._refresh(ref)

    def failed(self, ref: str, reason: str) -> None:
        """The workers could not load it: its tickets fail, its pages are free, the next request tries again."""
        with self._lock:
            entry = self._entries.pop(ref)
            self._free.extend(entry.run.pages)
            for owner in entry.owners:
                self._tickets[owner].state = f"failed: {ref}: {reason}"
            self._admit_waiting()

    def release(self, owner: str) -> None:
        """The owner is done; harmless if it has no ticket."""
        with self._lock:
            ticket = self._tickets.pop(owner, None)
            if ticket is None:
                return
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            for ref in ticket.tokens:
                if ref in self._entries:
                    self._entries[ref].owners.discard(owner)
            self._admit_waiting()

    @staticmethod
    def _is_pinned(entry: _Entry) -> bool:
        return bool(entry.owners)

    def _is_pinned_for_ever(self, ref: str) -> bool:
        return ref in self._entries and _FOREVER in self._entries[ref].owners

    def _admit(self, ticket: Ticket) -> bool:
        """Give the ticket all its pages, or none."""
        missing = {ref: self.pages_for(n) for ref, n in ticket.tokens.items() if ref not in self._entries}
        if missing and (self._waiting and self._waiting[0] is not ticket):
            return False  # first come, first served
        if not self._make_room(sum(missing.values()), keep=ticket.tokens):
            return False
        for ref, count in missing.items():
            run = PageRun(tuple(self._free.pop() for _ in range(count)), ticket.tokens[ref])
            self._entries[ref] = _Entry(run)
            self._loads.append(Load(ref, run))
        for ref in ticket.tokens:
            entry = self._entries[ref]
            entry.owners.add(ticket.owner)
            self._entries.move_to_end(ref)
            ticket.runs[ref] = entry.run
        self._settle(ticket)
        return True

    def _make_room(self, pages: int, keep: Mapping[str, int]) -> bool:
        victims = []
        room = len(self._free)
        for ref, entry in self._entries.items():
            if room >= pages:
                break
            if not self._is_pinned(entry) and entry.ready and ref not in keep:
                victims.append(ref)
                room += len(entry.run.pages)
        if room < pages:
            return False
        for ref in victims:
            self._free.extend(self._entries.pop(ref).run.pages)
            counters.POOL_EVICTIONS.labels("device").inc()
        return True

    def _admit_waiting(self) -> None:
        while self._waiting and self._admit(self._waiting[0]):
            self._waiting.popleft()

    def _refresh(self, ref: str) -> None:
        for owner in self._entries[ref].owners:
            self._settle(self._tickets[owner])
        self._admit_waiting()

    def _settle(self, ticket: Ticket) -> None:
        if not ticket.state.startswith("failed"):
            ready = all(ref in self._entries and self._entries[ref].ready for ref in ticket.tokens)
            ticket.state = "ready" if ready else "loading"


_FOREVER = "pinned for ever"
