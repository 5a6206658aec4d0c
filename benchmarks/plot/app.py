"""Draws the figures of the documents from the benchmarks' result files::

python -m benchmarks.plot
python -m benchmarks.plot RESULTS/engines-vllm-gpu-2026-11-21T1705.json --out FOLDER --machine gpu
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.record import RESULTS, ROOT
from benchmarks.plot.data import FIGURES, make_figure, read_reports
from benchmarks.plot.style import draw, require_matplotlib

OUT = ROOT / "docs" / "figures"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Result files, or folders of them.", show_default="benchmarks/results"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures.", show_default="docs/figures")] = OUT,
    machine: Annotated[
        str | None,
        typer.Option(help='"gpu" or "cpu": figures of these alone.', show_default="a GPU's where there are any"),
    ] = None,
) -> None:
    """Draw five figures, as SVG and PNG, of what the benchmarks have kept; say which one lacks its data.

    Newer files win over older ones. Exit code 1 if there is no data for any figure.
    """
    require_matplotlib()
    if machine not in (None, "gpu", "cpu"):
        raise ValueError(f'--machine: {machine!r} is neither "gpu" nor "cpu"')
    reports, drawn = read_reports(sources or [RESULTS]), 0
    for wanted in FIGURES:
        figure = make_figure(wanted, reports, machine)
        if figure is None:
            print(f"not drawn: {wanted.what}; its data: {wanted.command}")
            continue
        paths = draw(figure, out)
        drawn += 1
        print(f"{paths[0]} and .png: {wanted.what}, from {', '.join(source['file'] for source in figure.sources)}")
    if not drawn:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of ``python -m benchmarks.plot``: what the user can repair is a line on stderr and exit code 2."""
    try:
        app(prog_name="python -m benchmarks.plot")
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m benchmarks.plot: {error}", file=sys.stderr)
        raise SystemExit(2) from None
