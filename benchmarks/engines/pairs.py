"""Paired runs: who comes first, what a pair says, and when to stop."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

RESAMPLES = 4000


def order(repeat: int) -> tuple[str, str]:
    """(baseline, memory), (memory, baseline), (memory... : a drift of the machine's speed falls on both alike."""
    return ("baseline", "memory") if repeat % 2 == 0 else ("memory", "baseline")


@dataclass(frozen=True)
class Ratio:
    """memory / baseline over pairs. low, high: 95 % of the median's bootstrap over pairs, None of fewer than 3.
    min, max: of the pairs.
    """

    median: float
    low: float | None
    high: float | None
    min: float
    max: float
    pairs: int


def ratio(baseline: Sequence[float], memory: Sequence[float]) -> Ratio:
    """The ratio of values that were measured in pairs. Raises ValueError if they are none."""
    values = [m / b for b, m in zip(baseline, memory, strict=True)]
    if not values:
        raise ValueError("no pair was measured")
    low = high = None
    if len(values) >= 3:
        chance = random.Random(0)
        medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
        low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    return Ratio(statistics.median(values), low, high, min(values), max(values), len(values))


@dataclass
class Deadline:
    """Time that a command may take. clock: seconds, for tests."""

    minutes: float | None
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        """Seconds; endless without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes - (self.clock() - self.start)

    def allows(self, seconds: float) -> bool:
        """Whether something that took so long before still fits, with a fifth to spare."""
        return self.left > 1.2 * seconds


def run_pairs(
    run: dict[str, Callable[[int], dict[str, float]]], repeats: int, deadline: Deadline
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Run "baseline" and "memory" in alternating pairs, as many as fit; whole pairs only.

    run: side -> (repeat) -> figures. Returns the figures of each side, and the seconds of the longest pair.
    """
    found: dict[str, list[dict[str, float]]] = {"baseline": [], "memory": []}
    longest = 0.0
    for repeat in range(repeats):
        if not deadline.allows(longest):
            break
        begin = deadline.clock()
        pair = {side: run[side](repeat) for side in order(repeat)}
        longest = max(longest, deadline.clock() - begin)
        for side, figures in pair.items():
            found[side].append(figures)
    return found, longest
