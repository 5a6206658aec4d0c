"""How far a share can be trusted."""

from __future__ import annotations

import math


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    p, spread = right / asked, z * z / asked
    middle, half = p + spread / 2, z * math.sqrt(p * (1 - p) / asked + spread / asked / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (low if right else 0.0), (high if right < asked else 1.0)
