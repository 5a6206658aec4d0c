"""Frequencies of RoPE that a model's config lists itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GIVEN = "mem_triton_inv_freq"
"""A config's key for frequencies that stand in the place of those which its other fields give: of checkpoints whose
authors ran them on others. Engines know nothing of it; integrations put them into the engine's table."""


class UnsupportedRopeError(ValueError):
    """A position embedding whose keys cannot be moved, or that is not described fully. Names the config field."""


def given_frequencies(config: Mapping[str, Any], count: int) -> tuple[float, ...] | None:
    """The listed frequencies of ``count`` channel pairs, None if there are none. Raises UnsupportedRopeError."""
    found = config.get(GIVEN)
    if found is None:
        return None
    if (
        not isinstance(found, list | tuple)
        or len(found) != count
        or not all(isinstance(x, float | int) and 0 < x < math.inf for x in found)
    ):
        raise UnsupportedRopeError(f"{GIVEN}: expected {count} numbers above 0; convert the checkpoint again")
    return tuple(map(float, found))
