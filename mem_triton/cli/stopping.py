"""Ends a long run at its next safe point when the user interrupts it."""

from __future__ import annotations

import signal
from typing import Any


class Stop:
    """True once Ctrl-C or SIGTERM has come; the run then ends behind a checkpoint. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def __call__(self) -> bool:
        return self.asked

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
