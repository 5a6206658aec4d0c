"""How far a write is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.cli.sources import SourceDocuments
    from mem_triton.write import WriteReport

FIRST, EVERY = 1.0, 5.0
"""Seconds until the first line, and between lines."""


class Progress:
    """Tells of every text: the file it is in, entries, tokens a second, time left. total: bytes of all files."""

    def __init__(self, documents: SourceDocuments, total: int, quiet: bool) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.documents, self.total, self.quiet = documents, total, quiet
        self.terminal = sys.stderr.isatty()
        self.began = self.said = time.monotonic()
        self.next = FIRST
        self._text: Any = None
        self._characters = 0  # done when the present text began
        self.bar = Bar(
            TextColumn("{task.fields[file]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[entries]} entries, {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=output.console(stderr=True),
            disable=quiet or not self.terminal,
            transient=True,
        )
        self.task = self.bar.add_task("write", total=total or None, file="", entries=0, speed="-")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def __call__(self, report: WriteReport) -> None:
        if self.documents.present is not self._text:
            self._text, self._characters = self.documents.present, report.characters
        length = len(self._text.text)
        share = min(1.0, (report.characters - self._characters) / length) if length else 1.0
        done = self.documents.position(share)
        entries = len(report.added) + len(report.filled) + report.skipped
        speed = f"{report.tokens / report.seconds:.0f}" if report.seconds else "-"
        file = output.plain(self.documents.file)
        self.bar.update(self.task, completed=done, file=output.shorten(file, 40), entries=entries, speed=speed)
        now = time.monotonic()
        if self.quiet or self.terminal or now - self.said < self.next:
            return
        self.said, self.next = now, EVERY
        line = f"{file}: {entries} entries, {speed} tokens/s"
        if self.total and done:
            left = (now - self.began) * (self.total - done) / done
            line = f"{100 * done / self.total:.0f} %, {line}, {_time(left)} left"
        print(line, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
