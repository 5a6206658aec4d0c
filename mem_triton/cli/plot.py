"""``mem-triton plot``: the figures of the README out of the benchmarks' result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

RESULTS, OUT = Path("benchmarks/results"), Path("docs/figures")


def plot(
    sources: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="FILE...", help="Result files, or folders of them.", show_default=str(RESULTS)),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = OUT,
    machine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='"gpu" or "cpu": figures of these alone.', show_default="a GPU's where there are any"),
    ] = None,
) -> None:
    """Draw five figures, as SVG and PNG, of what the benchmarks have kept; say which one lacks its data.

    Newer files win over older ones. Exit code 1 if there is no data for any figure.
    """
    from mem_triton.cli.figure_data import FIGURES, make_figure, read_reports
    from mem_triton.cli.figure_style import draw, require_matplotlib

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
