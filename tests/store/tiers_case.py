"""A small pool with a disk that tests hold in their hands: a load waits until its gate is opened."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pages import Packed, PageLayout
from mem_triton.store.pool import PagePool
from mem_triton.store.tiers import MemoryTiers, Ticket

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

    def tokens(self, ref: str) -> int:
        return self.sizes[ref]

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
    """A pool of ``pages`` pages, a host cache of ``host_pages``, and a disk. Closes what it made."""

    disk: Disk
    pages: int = 4
    host_pages: int = 0
    workers: int = 2
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.pool = PagePool(LAYERS, HEADS, DIM, PAGE, self.pages, self.dtype, "cpu")
        self.tiers = MemoryTiers(
            self.pool, self.disk.load, placed, tokens=self.disk.tokens,
            host_bytes=self.host_pages * self.pool.layout.page_bytes, workers=self.workers,
        )  # fmt: skip

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_) -> None:
        self.disk.open(*self.disk.gated)
        self.tiers.close()

    def ready(self, refs: str, owner: str) -> Ticket:
        """Request and wait; ``refs`` is split at blanks."""
        ticket = self.tiers.request(refs.split(), owner)
        assert ticket.wait(SOON) == "ready", ticket.error
        return ticket

    def holds(self, ref: str) -> bool:
        """Whether the pages that ``run_of`` gives hold the entry, placed once, and nothing else."""
        run = self.tiers.run_of(ref)
        tokens = self.disk.sizes[ref]
        assert sum(run.tokens) == tokens and len(run.pages) == len(run.tokens) == -(-tokens // PAGE)
        return all(map(torch.equal, self.pool.read(run.pages), records(self.pool.layout, ref, tokens)))
