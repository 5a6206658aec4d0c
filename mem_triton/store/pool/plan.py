"""Describes what a request reads from explicit memory: references, and the query positions that see each of them.

Engine-neutral, made by the front end, sent along with the request, and obeyed by the workers::

    plan = (Attachment("alice@3"), Attachment("paris@1", first=64, end=128))
    seen_between(plan, 0, 64)                    # ("alice@3",)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mem_triton.ops.common.positions import FOREVER


@dataclass(frozen=True)
class Attachment:
    """One memory entry of one request. ref: immutable "id@version".

    first, end: the query positions [first, end) that attend to it. score: the retrieval's, None for an explicit id.
    """

    ref: str
    first: int = 0
    end: int = FOREVER
    score: float | None = None


def joined(plan: Iterable[Attachment]) -> tuple[Attachment, ...]:
    """The plan with one attachment for neighbouring or overlapping stretches that see the same reference."""
    parts: dict[str, list[Attachment]] = {}
    for a in sorted(plan, key=lambda a: a.first):
        before = parts.setdefault(a.ref, [])
        if before and a.first <= before[-1].end:
            before[-1] = replace(before[-1], end=max(before[-1].end, a.end))
        elif a.first < a.end:
            before.append(a)
    return tuple(a for some in parts.values() for a in some)


def seen_between(plan: Iterable[Attachment], start: int, end: int) -> tuple[str, ...]:
    """The references that some token in [start, end) attends to, with the part of it that does: a cache key."""
    seen = []
    for a in plan:
        first, last = max(a.first, start), min(a.end, end)
        if first < last:
            seen.append(a.ref if (first, last) == (start, end) else f"{a.ref}[{first - start}:{last - start}]")
    return tuple(sorted(seen))
