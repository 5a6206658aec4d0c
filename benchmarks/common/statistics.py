"""How a figure and its spread are told: the interval of a share, the median and the range of a few values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; unlike the normal one it is right at 0 and at all.

    Example::

        wilson(80, 80)  # (0.954..., 1.0)
    """
    if asked == 0:
        return 0.0, 1.0
    p, spread = right / asked, z * z / asked
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / asked + spread / asked / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (low if right else 0.0), (high if right < asked else 1.0)


def median_and_range(values: Iterable[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    values = sorted(values)
    return statistics.median(values), values[0], values[-1]
