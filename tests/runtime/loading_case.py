"""A small pool with a disk that tests hold in their hands: a load waits until its gate is opened."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pages import Packed, PageLayout
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.residency import Residency, Ticket

LAYERS, HEADS, DIM, PAGE = 2, 2, 8, 4
SOON = 20.0
"""Seconds that nothing here takes; a test that waits so long has failed."""


@lru_cache
def block(ref: str, tokens: int) -> MemoryBlock:
    """What lies on disk under ``ref``: no two references have a value in common."""
    seed = int.from_bytes(ref.encode(), "big") % (2**63)
    keys, values = torch.randn(2, LAYERS, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return MemoryBlock(keys, values, torch.arange(tokens, dtype=torch.int32).expand(LAYERS, HEADS, tokens))


def placed(b: MemoryBlock) -> MemoryBlock:
    """Stands for the rotation: something that shows if it is left out or done twice."""
    return MemoryBlock(b.keys + 1, b.values, b.positions - 8)


@lru_cache
def records(layout: PageLayout, ref: str, tokens: int) -> Packed:
    """What its pages hold when it has been placed once."""
    return layout.pack(placed(block(ref, tokens)))


@dataclass
class Disk:
    """sizes: reference -> tokens. Loads of ``gated`` references wait for ``open``; those of ``broken`` ones fail.

    meanwhile: called inside every load.
    """

    sizes: dict[str, int]
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    loads: Counter = field(default_factory=Counter)
    meanwhile: Callable[[], None] = lambda: None
    _gate: threading.Condition = field(default_factory=threading.Condition)

    def load(self, ref: str) -> MemoryBlock:
        with self._gate:
            self.loads[ref] += 1
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: ref not in self.gated, SOON)
        self.meanwhile()
        if ref in self.broken:
            raise OSError("disk on fire")
        return block(ref, self.sizes[ref])

    def open(self, *refs: str) -> None:
        """Let loads of these go on."""
        with self._gate:
            self.gated -= set(refs)
            self._gate.notify_all()

    def wait_until_loading(self, ref: str, count: int = 1) -> None:
        """Until a thread is inside ``load(ref)``, or has been ``count`` times."""
        with self._gate:
            assert self._gate.wait_for(lambda: self.loads[ref] >= count, SOON)


@dataclass
class Bench:
    """The way of an entry into its pages, in one process: what the front end decides, one worker carries out.

    A pool of ``pages`` pages, a host cache of ``host_pages``, and a disk. Closes what it made.
    """

    disk: Disk
    pages: int = 4
    host_pages: int = 0
    workers: int = 2
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.pool = PagePool(LAYERS, HEADS, DIM, PAGE, self.pages, self.dtype, "cpu")
        host_bytes = self.host_pages * self.pool.layout.page_bytes
        self.loader = PageLoader(
            self.pool, lambda ref: nullcontext(placed(self.disk.load(ref))), host_bytes, self.workers
        )
        self.residency = Residency(self.pages, PAGE, self.pool.layout.page_bytes)
        self._under_way: dict[str, Future[str | None]] = {}
        self._calls = threading.Lock()  # an engine's front end calls its workers from one thread

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_) -> None:
        self.disk.open(*self.disk.gated)
        self.loader.close()

    def request(self, refs: str, owner: str) -> Ticket:
        """Claim entries and tell the worker what to load; ``refs`` is split at blanks."""
        ticket = self.residency.request(owner, {ref: self.disk.sizes[ref] for ref in refs.split()})
        self.call()
        return ticket

    def call(self) -> None:
        """Tell the worker what to load, and hear what it has loaded."""
        with self._calls:
            self._order()
            for ref in [ref for ref, over in self._under_way.items() if over.done()]:
                if error := self._under_way.pop(ref).result():
                    self.residency.failed(ref, error)
                else:
                    self.residency.loaded(ref)
            self._order()  # for those that were let in

    def _order(self) -> None:
        for load in self.residency.take_loads():
            self._under_way[load.ref] = self.start(load)

    def start(self, load: PageLoad) -> Future[str | None]:
        """Give the worker an order."""
        return self.loader.load(load)

    def wait(self, ticket: Ticket) -> str:
        """Its state once it is ready or failed."""
        until = time.monotonic() + SOON
        while ticket.state in ("waiting", "loading"):
            assert time.monotonic() < until, ticket.state
            time.sleep(0.0005)
            self.call()
        return ticket.state

    def ready(self, refs: str, owner: str) -> Ticket:
        """Request and wait."""
        ticket = self.request(refs, owner)
        assert self.wait(ticket) == "ready"
        return ticket

    def visit(self, *refs: str) -> None:
        """Read each entry and let it go again."""
        for ref in refs:
            self.ready(ref, "visitor")
            assert self.holds(ref)
            self.residency.release("visitor")

    def run_of(self, ref: str) -> tuple[int, ...]:
        """The pages of an entry that is there. Raises KeyError if it is not."""
        entry = self.residency._ledger.entries[ref]
        if not entry.ready:
            raise KeyError(ref)
        return entry.pages

    def holds(self, ref: str) -> bool:
        """Whether the entry's pages hold it, placed once, and nothing else."""
        pages, tokens = self.run_of(ref), self.disk.sizes[ref]
        assert len(pages) == -(-tokens // PAGE)
        return all(map(torch.equal, self.pool.read(pages), records(self.pool.layout, ref, tokens)))
