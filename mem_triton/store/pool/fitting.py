"""Decides in the front end what of a plan fits a worker's tables and the pool, before a request is admitted.

A step's tables hold the pages that any of its tokens sees, once for each stretch of tokens that sees them. The most
that these can be follows from the plan alone, so a request that is admitted fits whatever the scheduler makes of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from mem_triton.store.pool.plan import Attachment, joined

PagesOf = Callable[[str], int]
"""Pages of a reference."""


def most_pages(plan: Sequence[Attachment], pages_of: PagesOf, window: int) -> int:
    """The most pages that a step of at most ``window`` tokens of the request sees, wherever it begins."""
    parts = joined(plan)
    if not parts:
        return 0
    if len({(a.first, a.end) for a in parts}) == 1:  # as named ones are: whoever sees one sees all
        return sum(pages_of(a.ref) for a in parts)
    first, end = (np.array([getattr(a, name) for a in parts], np.int64) for name in ("first", "end"))
    pages = np.array([pages_of(a.ref) for a in parts], np.int64)
    begun, ended = np.argsort(first), np.argsort(end)
    opened, closed = (np.concatenate([[0], np.cumsum(pages[order])]) for order in (begun, ended))
    last = first  # a step sees most where its last token is the first one to see something
    seen = opened[np.searchsorted(first[begun], last, "right")]
    gone = closed[np.searchsorted(end[ended], last - window + 1, "right")]
    return int((seen - gone).max())


def fitting(
    plan: Sequence[Attachment], pages_of: PagesOf, *, window: int, table_pages: int, pool_pages: int
) -> tuple[Attachment, ...]:
    """The plan without the retrieved references that do not fit; those that were named all stay.

    table_pages: that a step may see; pool_pages: that all its references together may take. Of each stretch of tokens
    the references that resemble it most stay longest.
    """

    def fits(some: Sequence[Attachment]) -> bool:
        together = sum(pages_of(ref) for ref in {a.ref for a in some})
        return together <= pool_pages and most_pages(some, pages_of, window) <= table_pages

    if fits(plan):
        return tuple(plan)
    named = [a for a in plan if a.score is None]
    ranks: dict[int, int] = {}
    ranked = []
    for a in sorted((a for a in plan if a.score is not None), key=lambda a: -a.score):
        ranked.append((ranks.get(a.first, 0), len(ranked), a))
        ranks[a.first] = ranks.get(a.first, 0) + 1
    ranked.sort(key=lambda entry: entry[:2])
    found = [a for _, _, a in ranked]
    most = bisect_left(range(1, len(found) + 1), True, key=lambda n: not fits([*named, *found[:n]]))
    kept = {id(a) for a in (*named, *found[:most])}
    return tuple(a for a in plan if id(a) in kept)
