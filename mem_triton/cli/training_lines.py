"""Says on stderr how far a training run is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from mem_triton.cli import output

EVERY = 5.0
"""Seconds between two lines about steps."""


class TrainingLines:
    """Takes the lines of a run's log. evaluation: what is said of an evaluation, None for a line of another kind; step:
    what is said of a step, now and then. quiet: nothing is said."""

    def __init__(
        self,
        quiet: bool,
        evaluation: Callable[[Mapping[str, Any]], str | None],
        step: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self.quiet, self.evaluation, self.step, self.said = quiet, evaluation, step, 0.0

    def __call__(self, line: Mapping[str, Any]) -> None:
        if (text := self.evaluation(line)) is not None:
            return self.say(text)
        if "loss" not in line or time.monotonic() - self.said < EVERY:
            return None
        self.said = time.monotonic()
        return self.say(self.step(line))

    def say(self, text: str) -> None:
        """Say a sentence."""
        if not self.quiet:
            print(output.plain(text), file=sys.stderr, flush=True)
