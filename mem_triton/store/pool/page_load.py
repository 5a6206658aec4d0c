"""The load of one entry into its pages: what the front end decides, and what every worker is told."""

from __future__ import annotations

from typing import NamedTuple


class PageLoad(NamedTuple):
    """Names an entry that all workers load. Crosses processes as a plain list or tuple of its fields.

    ref: "id@version". pages: of the pool, in the entry's order; they are nobody else's until the load is over.
    tokens: how many of the pages' tokens it fills.
    """

    ref: str
    pages: list[int]
    tokens: int
