"""Finds entries that were trained elsewhere and imported, and warns requests that read several of them."""

from __future__ import annotations

from collections.abc import Sequence

from mem_triton.store.bank import EntryInfo

TRAINED = "trained"
"""Key of the metadata of entries that were imported."""


def is_trained(entry: EntryInfo) -> bool:
    """Whether an entry's keys and values were trained elsewhere."""
    return TRAINED in entry.metadata


def side_by_side(trained: Sequence[str]) -> str | None:
    """What to say of a request that reads these trained entries; None if they are fewer than two."""
    if len(trained) < 2:
        return None
    return f"{', '.join(trained)} were not trained together: what they give side by side is untested"
