"""Shows a run of the protocol turn by turn, while it goes on."""

from __future__ import annotations

import sys

from rich.status import Status
from rich.text import Text

from mem_triton.cli.output import console, plain
from mem_triton.systems.memo.protocol.state import Call, Event, Stage, State

STYLES = {"answer": "green", "unknown": "yellow", "failed": "red"}


class Lines:
    """Prints each turn's questions and replies on stderr, and on a terminal what is waited for."""

    def __init__(self) -> None:
        self._out = console(stderr=True)
        self._replies = self._notes = 0
        self._turn: tuple[Stage, int] | None = None
        self._status: Status | None = None
        if sys.stderr.isatty():
            self._status = self._out.status("")
            self._status.start()

    def __call__(self, state: State, calls: list[Call], event: Event | None) -> None:
        """A step of the run."""
        for item in state.evidence[self._replies :]:
            if (item.stage, item.turn) != self._turn:
                self._turn = (item.stage, item.turn)
                self._say(f"{item.stage}" + (f", turn {item.turn}" if item.turn else ""), "bold")
            self._say(f"  {item.number}. {item.question}", "")
            self._say(f"     {item.outcome}: {item.text}", STYLES[item.outcome])
        for note in state.notes[self._notes :]:
            self._say(f"  {note}", "dim")
        self._replies, self._notes = len(state.evidence), len(state.notes)
        if self._status is not None:
            waiting = [call.to for call in state.open.values()]
            words = [f"{waiting.count(to)} {to}" for to in ("executive", "memory") if to in waiting]
            self._status.update(f"{state.stage}: waiting for {' and '.join(words)}" if words else "")

    def close(self) -> None:
        """End the line that moves."""
        if self._status is not None:
            self._status.stop()

    def _say(self, text: str, style: str) -> None:
        self._out.print(Text(plain(text), style), soft_wrap=True)
