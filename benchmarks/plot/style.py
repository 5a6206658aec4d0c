"""How figures look: colours that every eye can tell apart, on white, legible in GitHub's light and dark pages."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plot.data import FLOOR, Figure, Line, Panel, machine_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
OTHERS = ("#555555", "#E69F00", "#56B4E9", "#999999", "#B8A400")
MARKS = "osD^vPX<>"
INK, GRID = "#222222", "#DDDDDD"
SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "mem_triton",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.6,
}


class PlotError(ImportError):
    """matplotlib is missing; the message says what to install."""


def require_matplotlib() -> None:
    """Raise PlotError, which says how to install it, if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError(f'figures need matplotlib ({error}); install it: pip install "mem-triton[plot]"') from None


def draw(figure: Figure, folder: Path) -> list[Path]:
    """Write ``<name>.svg`` and ``<name>.png``, and return their paths."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    panels = figure.panels[:6]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(SETTINGS):
        width = max(6.4, 5.0 * columns)
        canvas = Canvas(figsize=(width, 3.9 * rows + 0.7), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.suptitle(figure.title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        all_axes = canvas.subplots(rows, columns, squeeze=False).flat
        for place, (axes, panel) in enumerate(zip(all_axes, panels, strict=False)):
            fill(axes, panel, place)
        for axes in canvas.axes[len(panels) :]:
            axes.set_visible(False)
        canvas.supxlabel(small_print(figure, int(18 * width)), fontsize=7, color="#666666", x=0.01, ha="left")
        paths = [folder / f"{figure.name}.{kind}" for kind in ("svg", "png")]
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            made = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            canvas.savefig(path, dpi=160, metadata=made)  # no date: the same data give the same file
    return paths


def small_print(figure: Figure, width: int) -> str:
    """What the bars are; machine, versions, date, commit and file of each source; lines of ``width`` characters."""
    lines = [figure.spread]
    for source in figure.sources:
        versions = source.get("versions", {})
        named = [f"{name} {versions[name]}" for name in ("vllm", "sglang", "torch", "triton") if name in versions]
        commit = (source.get("commit") or "")[:9] + ("+" if source.get("changed_files") else "")
        words = [machine_of(source), *named, source["date"][:10], commit, source["file"]]
        whole = " · ".join(word.replace(" ", "\xa0") for word in words if word)  # a word stays in its line
        lines += [line.replace("\xa0", " ") for line in textwrap.wrap(whole, width, subsequent_indent="  ")]
    return "\n".join(lines)


def fill(axes: Axes, panel: Panel, place: int) -> None:
    """place: the panel's, for the names of its lines in the SVG: ``panel-0-line-1``."""
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if panel.mark is not None:
        axes.axhline(panel.mark, color=INK, linewidth=1)
    for number, (line, style) in enumerate(zip(panel.lines, styles(panel.lines), strict=True)):
        style = {**style, "gid": f"panel-{place}-line-{number}"}
        (bars if panel.ticks else curve)(axes, line, style, number, len(panel.lines))
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.35 * max(p.high or p.y for line in panel.lines for p in line.points))  # room for the legend
    else:
        scale(axes, panel)
    if not panel.ticks and "y" not in panel.log:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.07 * (high - low) * (1 + len(panel.lines)))  # room for the legend
    axes.legend(fontsize=8)


def styles(lines: list[Line]) -> list[dict[str, Any]]:
    """Colour, mark and dashes of each line; ours have the strong colours."""
    ours, others, found = iter(OURS), iter(OTHERS), []
    for number, line in enumerate(lines):
        if line.role == FLOOR:
            found.append({"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1.2})
            continue
        dashes = "-" if line.role == "memory" else (0, (6, 1.5))
        colour = next(ours if line.role == "memory" else others, INK)
        found.append({"color": colour, "linestyle": dashes, "marker": MARKS[number % len(MARKS)]})
    return found


def curve(axes: Axes, line: Line, style: dict[str, Any], number: int, count: int) -> None:
    points = sorted(line.points)
    x, y = [p.x for p in points], [p.y for p in points]
    axes.plot(x, y, label=line.label, **style)
    if (spread := spread_of(points)) is not None:
        plain = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.1, "capsize": 2.5}
        axes.errorbar(x, y, yerr=spread, **plain)


def bars(axes: Axes, line: Line, style: dict[str, Any], number: int, count: int) -> None:
    width = 0.8 / count
    x = [p.x + (number - (count - 1) / 2) * width for p in line.points]
    y = [p.y for p in line.points]
    axes.bar(x, y, 0.92 * width, label=line.label, color=style["color"])
    if (spread := spread_of(line.points)) is not None:
        axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3)
    for at, value in zip(x, y, strict=True):
        axes.annotate(f"{value:.3g}", (at, 0), (0, 3), textcoords="offset points", ha="center", color="white")


def spread_of(points: list[Any]) -> list[list[float]] | None:
    if any(p.low is None or p.high is None for p in points):
        return None
    return [[max(0.0, p.y - p.low) for p in points], [max(0.0, p.high - p.y) for p in points]]


def scale(axes: Axes, panel: Panel) -> None:
    """Logarithmic axes with plain numbers; batches and lengths are powers of two, each with its own mark."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    places = sorted({p.x for line in panel.lines for p in line.points})
    if "x" in panel.log and places and places[0] > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_locator(NullLocator())
        if len(places) == 1:
            axes.set_xlim(places[0] / 2, places[0] * 2)
    if "y" in panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plain)
        values = [p.y for line in panel.lines for p in line.points]
        if max(values) < 30 * min(values):  # less than two decades: powers of ten alone would say little
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}" if f"{v:e}"[0] in "25" else ""))
