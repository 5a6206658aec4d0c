"""The log of a run: a JSON line for each step and each evaluation, and the loss curve as CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from mem_triton.store.files import write_durably

LOG, CURVE = "training.jsonl", "loss.csv"
COLUMNS = ("step", "stage", "kind", "loss", "recalled_loss", "exact", "right", "rate", "norm", "tokens", "seconds")


class Journal:
    """Appends lines to the log of a folder. step: lines behind it, of a run that was killed, are taken out first.

    columns: of the loss curve.
    """

    def __init__(self, out: Path, step: int, columns: tuple[str, ...] = COLUMNS) -> None:
        self.path, self.curve, self.columns = out / LOG, out / CURVE, columns
        lines = self.lines = [line for line in read(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_durably(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._write_curve(lines)

    def last(self, name: str) -> Any:
        """The newest value of a field in what was there at the beginning."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. Raises OSError where the disk is full."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "loss" in line:
            with self.curve.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(line)

    def _write_curve(self, lines: list[dict[str, Any]]) -> None:
        with self.curve.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(line for line in lines if "loss" in line)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill has cut short is left out."""
    found = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                found.append(line)
    return found
