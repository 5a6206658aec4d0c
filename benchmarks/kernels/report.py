"""How a run is shown and kept: a table per operation, one JSON file, and the same rows as CSV.

A row is flat. Whose: op, models (names, separated by spaces), case, series, dtype, and the sizes of its shape. What:
variant, baseline (false = ours), note, status ("ok", "WRONG", "failed"), error, tolerance. Cost: bytes, flops,
floor_us, us, us_p10, us_p90, rounds, share_of_floor. Ours also has "times faster than <baseline>" for every baseline
of its case that was timed. What a row lacks, a time above all where the gate is red, is empty in CSV.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import record
from benchmarks.kernels.runner import OK, Row

FASTER = "times faster than "


def columns(rows: list[Row]) -> list[str]:
    """All keys, in the order in which they first come; ratios last."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return sorted(keys, key=lambda key: key.startswith(FASTER))


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def keep(report: dict[str, Any], folder: Path) -> Path:
    """Write the JSON file and, beside it, its rows as CSV; returns the JSON file's path."""
    path = record.save(report, "kernels", folder)
    path.with_suffix(".csv").write_text(to_csv(report["rows"]), encoding="utf-8")
    return path


def show(console: Console, title: str, rows: list[Row]) -> None:
    """One table; columns without a figure in any row are left out."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    with_floor = any(row.get("floor_us") is not None for row in rows)
    floor = ("floor us", "of floor") if with_floor else ()
    for name in ("", "bytes", "flops", *floor, "us \\[10 %, 90 %]", "times faster than", "error"):
        table.add_column(name, justify="left" if name in ("", "times faster than") else "right", no_wrap=True)
    before = None
    for row in rows:
        here = (row["models"], row["case"], row["dtype"])
        if here != before:
            table.add_section()
            table.add_row(f"[bold]{row['case']}[/], {row['dtype']}, {row['models']}")
        before = here
        cells = [row["variant"] + ("*" if row["note"] else ""), *work(row)]
        if with_floor:
            cells += [number(row.get("floor_us")), f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""]
        time = f"{number(row['us'])} \\[{number(row['us_p10'])}, {number(row['us_p90'])}]" if "us" in row else ""
        cells += [time if row["status"] == OK else f"[bold red]{row['status']}", ratios(row), judged(row)]
        table.add_row("  " + cells[0], *cells[1:])
    console.print(table)
    notes = {row["variant"]: row["note"] for row in rows if row["note"]}
    console.print("\n".join(f"  * {variant}: {note}" for variant, note in notes.items()))


def work(row: Row) -> tuple[str, str]:
    return (f"{scaled(row['bytes'])}B", scaled(row["flops"])) if "bytes" in row else ("", "")


def ratios(row: Row) -> str:
    """ "1.31x vllm triton", one a line."""
    found = [(key.removeprefix(FASTER), value) for key, value in row.items() if key.startswith(FASTER)]
    return "\n".join(f"{value:.2f}x {name}" for name, value in found)


def judged(row: Row) -> str:
    return f"{row['error']:.1e} of {row['tolerance']:.0e}" if "error" in row else ""


def scaled(value: float) -> str:
    """12.3 M, with a space; 0 for nothing."""
    power = 0
    while abs(value) >= 1000 and power < 4:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('', 'k', 'M', 'G', 'T')[power]}"


def number(value: float | None) -> str:
    """Three digits, and no exponent."""
    return "" if value is None else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"
