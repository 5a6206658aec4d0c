"""Names the load of one entry into its pages, and follows it on a worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class PageLoad:
    """Names an entry that all workers load, and follows it on each.

    ref: "id@version". pages: of the pool, in the entry's order; they are nobody else's until the load is over. tokens:
    how many of the pages' tokens it fills. These three are the ``order``, which crosses processes.

    On a worker, after: marks of the steps that may still read what lies in the pages. host_pages: where the host cache
    has it. began: when a thread was asked for it. When it is over, ``copied`` is the finished copy's mark, or ``error``
    says why there is none; ``over`` is done then, with ``error``.
    """

    ref: str
    pages: Sequence[int]
    tokens: int
    after: Sequence[Any] = ()
    host_pages: Sequence[int] | None = None
    copied: Any = None
    error: str | None = None
    began: float = field(default_factory=time.perf_counter)
    over: Future[str | None] = field(default_factory=Future)

    @property
    def order(self) -> tuple[str, list[int], int]:
        """Return the order to a worker, which makes its own load of it by ``PageLoad(*order)``."""
        return self.ref, list(self.pages), self.tokens

    def end(self, error: str | None) -> None:
        """Tell who waits; what fails after its end changes nothing."""
        if not self.over.done():
            self.over.set_result(error)
