"""What commands print: tables for people on a terminal, JSON for scripts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

LEAST = 24
"""Terminal cells that a wide column needs to be worth having on the same line."""


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], wide: str | None = None) -> None:
    """A table on stdout, no cell of it cut but those of the column ``wide``, which get what room is left on one line.

    Where there is hardly any, each row takes a second line for its wide cell; what is wider than the terminal still is
    written whole, and the terminal wraps it.
    """
    cells = [[plain(value) for value in row] for row in rows]
    out, at = console(), columns.index(wide) if wide else None
    narrow = [i for i in range(len(columns)) if i != at]
    widths = {i: max(cell_len(row[i]) for row in [list(columns), *cells]) for i in narrow}
    left = out.width - sum(width + 2 for width in widths.values())
    if not sys.stdout.isatty():  # a row is a line there, however long
        left = max(left, 2 * LEAST)
    stacked = at is not None and left < LEAST

    def write(row: Sequence[str], style: str = "") -> None:
        line = "  ".join(set_cell_size(row[i], widths[i]) for i in narrow)
        if at is not None and not stacked:
            line += "  " + shorten(row[at], left)
        out.print(Text(line.rstrip(), style), soft_wrap=True)
        if stacked and not style:
            out.print(Text("  " + shorten(row[at], out.width - 2)), soft_wrap=True)

    write(columns, "bold")
    for row in cells:
        write(row)


def print_problems(problems: Sequence[str], well: str, as_json: bool) -> None:
    """Print what a check has found, or ``well``; exit code 1 if it has found anything."""
    if as_json:
        print_json({"problems": list(problems)})
    else:
        print("\n".join(problems) or well)
    if problems:
        raise typer.Exit(1)


def note(text: str) -> None:
    """A line on stderr that is no part of what was asked for."""
    console(stderr=True).print(Text(plain(text), "dim"), soft_wrap=True)


def shorten(text: str, width: int) -> str:
    """A text on one line of at most so many terminal cells; what is cut off shows as "…"."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def plain(value: Any) -> str:
    """A value on one line, as any terminal and any file can take it: no half surrogates, no control characters."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in text)


def print_fields(fields: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        console().print(Text(f"{name:<{width}}  {plain(value)}"), soft_wrap=True)


def console(stderr: bool = False) -> Console:
    """Rich's console; away from a terminal lines are not cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 200)


def when(seconds: float) -> str:
    """Local time to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
