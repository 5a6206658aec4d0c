"""From result files to what a figure shows: series of points with their spread. No drawing here.

Files are those that ``benchmarks.common.record`` writes: ``engines-*.json``, ``kernels-*.json`` and ``rag-*.json``. Of
several files the newer one wins, point by point, so that runs of a few minutes each add up to one figure. Figures never
mix machines: those measured on a GPU win over those on a CPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

STOCK, FLOOR = "stock", "floor"
MEMORY = {"delta": "δ-mem", "explicit": "explicit memory, 5 references", "pool": "a shared pool"}


class Point(NamedTuple):
    """low, high: the spread; None where a point has none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass
class Line:
    """role: "memory" (ours), "baseline" or "floor"; it decides how the line is drawn."""

    label: str
    role: str
    points: list[Point]


@dataclass
class Panel:
    """One set of axes. bars: the points of each line are bars side by side, at the places that ``ticks`` name."""

    title: str
    x: str
    y: str
    lines: list[Line]
    log: str = "x"  # which axes are logarithmic: "", "x", "xy"
    mark: float | None = None  # a horizontal line at "no difference"
    ticks: Sequence[str] = ()


@dataclass
class Figure:
    """spread: what the error bars are. sources: the reports that it was made of."""

    name: str
    title: str
    spread: str
    panels: list[Panel]
    sources: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """A figure: how it is made of reports, which files it reads, and the command that makes such files."""

    name: str
    what: str
    file: str | tuple[str, ...]  # how their names begin
    make: Callable[[list[dict[str, Any]]], Figure | None]
    command: str


def read_reports(sources: Iterable[Path]) -> list[dict[str, Any]]:
    """Result files, and those in folders, newest first. Raises ValueError naming a file that is none."""
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source}: there is no such file or folder")
        paths += sorted(source.glob("*.json")) if source.is_dir() else [source]
    reports = []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            report = {**report, "file": path.name, "machine": report["machine"], "date": report["date"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            if any(path.is_relative_to(folder) for folder in sources if folder.is_dir()):
                continue  # a folder may hold other things
            raise ValueError(f"{path}: no result file of benchmarks/: {error!r}") from None
        reports.append(report)
    return sorted(reports, key=lambda report: report["date"], reverse=True)


def machine_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores (a CPU: says nothing about a GPU)"


def chosen(
    reports: list[dict[str, Any]], file: str | tuple[str, ...], machine: str | None
) -> list[list[dict[str, Any]]]:
    """The reports of files named ``file``..., by machine: GPUs first, then by date. machine: "gpu" or "cpu" alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for report in (report for report in reports if report["file"].startswith(file)):
        kind = "gpu" if report["machine"]["gpu"] else "cpu"
        if machine in (None, kind):
            groups.setdefault(machine_of(report), []).append(report)
    return sorted(groups.values(), key=lambda group: not group[0]["machine"]["gpu"])  # stable: newest first


def make_figure(wanted: Wanted, reports: list[dict[str, Any]], machine: str | None) -> Figure | None:
    """The figure, of the first machine that has data for it; None if none has."""
    for group in chosen(reports, wanted.file, machine):
        if figure := wanted.make(group):
            return figure
    return None


class _Rows:
    """Rows of engine reports under a key each; the newest report's row wins."""

    def __init__(self, reports: list[dict[str, Any]], metric: Callable[[dict[str, Any]], str | None]) -> None:
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.sources: list[dict[str, Any]] = []
        for report in reports:
            for row in report["rows"]:
                name = metric(row)
                if row["gate"] != "green" or name is None or name not in row["metrics"]:
                    continue
                panel = (report["engine"], report["model"]["name"], row["context"])
                key = (*panel, row["comparison"], row["memory"], row["batch"])
                if key not in self.rows:
                    self.rows[key] = {**row, "panel": panel, "values": row["metrics"][name]}
                    if report not in self.sources:
                        self.sources.append(report)

    def panels(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(title, its rows by batch), a panel an engine, model and context."""
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows.values():
            found.setdefault(row["panel"], []).append(row)
        titles = {"vllm": "vLLM", "sglang": "SGLang"}
        return [
            (f"{titles.get(engine, engine)}, {model}, context {context}", sorted(rows, key=lambda r: r["batch"]))
            for (engine, model, context), rows in sorted(
                found.items(), key=lambda item: (item[0][0] != "vllm", item[0])
            )
        ]


def _decode(row: dict[str, Any]) -> str | None:
    """Decode steps of memory beside the same prompts on a stock engine."""
    return "decode_ms" if row["baseline"] == STOCK and not row["more_tokens_of_baseline"] else None


def _point(x: float, values: Sequence[float]) -> Point:
    return Point(x, statistics.median(values), min(values), max(values))


def decode_latency(reports: list[dict[str, Any]]) -> Figure | None:
    rows, panels = _Rows(reports, _decode), []
    for title, own in rows.panels():
        stock: dict[int, list[float]] = {}
        for row in own:
            stock.setdefault(row["batch"], []).extend(row["values"]["baseline"])
        lines = [Line(STOCK, "baseline", [_point(batch, values) for batch, values in stock.items()])]
        for name, label in MEMORY.items():
            if points := [_point(r["batch"], r["values"]["memory"]) for r in own if r["memory"] == name]:
                lines.append(Line(label, "memory", points))
        floors = {r["batch"]: r["floor_ms"] for r in own if r["floor_ms"]}
        if floors:
            lines.append(Line("floor: bytes and flops of stock", FLOOR, [Point(b, f) for b, f in floors.items()]))
        panels.append(Panel(title, "requests at once", "one decode step, ms", lines, "xy"))
    title, spread = "Decode step against batch", "median of runs; bars: smallest and largest"
    return Figure("decode-latency", title, spread, panels, rows.sources) if panels else None


def step_overhead(reports: list[dict[str, Any]]) -> Figure | None:
    rows, panels = _Rows(reports, _decode), []
    for title, own in rows.panels():
        lines = []
        for name, label in MEMORY.items():
            points = [_overhead(r["batch"], r["values"]["speed"]) for r in own if r["memory"] == name]
            if points:
                lines.append(Line(label, "memory", points))
        panels.append(Panel(title, "requests at once", "added to a stock decode step, %", lines, "x", 0.0))
    title = "What memory adds to a decode step"
    spread = "median of pairs of runs; bars: 95 % interval of that median"
    return Figure("step-overhead", title, spread, panels, rows.sources) if panels else None


def _overhead(batch: int, speed: dict[str, float]) -> Point:
    """speed: how much faster memory is than stock; 0.8 is 25 % more time."""
    found = [speed[name] for name in ("median", "high", "low")]  # the last two are None of fewer than 3 pairs
    return Point(batch, *(None if value is None else 100 * (1 / value - 1) for value in found))


def pool_speedup(reports: list[dict[str, Any]]) -> Figure | None:
    """From kernels, one layer, or from engines, whole decode steps."""
    kernels = [report for report in reports if report["file"].startswith("kernels-")]
    engines = [report for report in reports if report["file"].startswith("engines-")]
    panels, sources = [], []
    rows, source = _series(kernels, "pool_batch")
    ours = _ours(rows)
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows if row["baseline"]):
        theirs = {row["batch"]: row for row in rows if row["variant"] == name}
        points = [_faster(row, theirs[row["batch"]]) for row in ours if row["batch"] in theirs]
        if points and not name.startswith("context"):  # that one does not read the pool at all
            lines.append(Line(f"than {name.replace('as prefix: ', '')}, {_reads(name)}", "memory", points))
    if lines:
        title = f"attention of one layer, {ours[0]['models'].split()[0]}, pool of {ours[0]['shared']:,} tokens"
        panels.append(Panel(title, "requests at once", "times faster", lines, "xy", 1.0))
        sources.append(source)
    shared = _Rows(engines, lambda row: "decode_ms" if row["comparison"] == "shared pool" else None)
    for title, own in shared.panels():
        points = [Point(r["batch"], *(r["values"]["speed"][k] for k in ("median", "low", "high"))) for r in own]
        line = Line("than a pool that each request reads", "memory", points)
        panels.append(Panel(f"whole decode step, {title}", "requests at once", "times faster", [line], "x", 1.0))
    sources += [source for source in shared.sources if source not in sources]
    title = "A pool that all requests share, against one read by each"
    spread = "bars: 10 to 90 % of runs (one layer), 95 % interval of the median of pairs (decode step)"
    return Figure("pool-speedup", title, spread, panels, sources) if panels else None


def _reads(variant: str) -> str:
    return "pool read per request" if variant.startswith("as prefix") or variant == "cat" else "pool read once"


def _faster(ours: dict[str, Any], theirs: dict[str, Any]) -> Point:
    return Point(
        ours["batch"], theirs["us"] / ours["us"], theirs["us_p10"] / ours["us_p90"], theirs["us_p90"] / ours["us_p10"]
    )


def _ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case the way that would be taken: the policy's choice, which may be another one for another batch."""
    own: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row["baseline"] and (row["case"] not in own or "policy's choice" in (row.get("note") or "")):
            own[row["case"]] = row
    return list(own.values())


def _series(reports: list[dict[str, Any]], series: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The timed rows of a series, of the first models and precision that have it; and their report."""
    for report in reports:
        rows = [r for r in report["rows"] if r.get("series") == series and r.get("status") == "ok" and r.get("us")]
        if rows:
            first = rows[0]
            return [r for r in rows if (r["models"], r["dtype"]) == (first["models"], first["dtype"])], report
    return [], {}


def scan_time(reports: list[dict[str, Any]]) -> Figure | None:
    rows, source = _series(reports, "scan_length")
    if not rows:
        return None
    own = _ours(rows)
    series = {"mem_triton": own} | {
        name: [r for r in rows if r["variant"] == name]
        for name in dict.fromkeys(row["variant"] for row in rows if row["baseline"])
    }
    lines = [
        Line(
            name,
            "memory" if one is own else "baseline",
            [Point(r["queries"], r["us"], r["us_p10"], r["us_p90"]) for r in one],
        )
        for name, one in series.items()
    ]
    floors = [Point(r["queries"], r["floor_us"]) for r in own if r.get("floor_us")]
    if floors:
        lines.append(Line("floor: bytes and flops", FLOOR, floors))
    title = f"one layer, {rows[0]['models'].split()[0]}, {rows[0]['dtype']}"
    panel = Panel(title, "tokens", "time, µs", lines, "xy")
    return Figure("scan-time", "δ-mem's scan of a prompt", "median of runs; bars: 10 to 90 %", [panel], [source])


def recall_ttft(reports: list[dict[str, Any]]) -> Figure | None:
    """Recall questions of ``benchmarks.rag``, and the same prompts' lengths on engines with real shapes."""
    panels, sources = [], []
    for report in [report for report in reports if report["file"].startswith("rag-")][:1]:
        lines = []
        for name, role in (("text RAG", "baseline"), ("explicit memory", "memory")):
            side = report["sides"][name]
            label = f"{name}: {side['prompt_tokens']:.0f} prompt tokens, {side['right']} of {side['asked']} right"
            values = [[1000 * t for t in side[key]] for key in ("ttft_alone", "ttft")]
            if all(values):
                lines.append(Line(label, role, [_point(x, v) for x, v in enumerate(values)]))
        ticks = ("one request", f"{report['requests_at_once']} requests at once")
        if len(lines) == 2:
            panels.append(
                Panel("recall of facts, small trained model", "", "time to first token, ms", lines, "", ticks=ticks)
            )
            sources.append(report)
    engines = [report for report in reports if report["file"].startswith("engines-")]
    texts = _Rows(engines, lambda row: _first_token(row) if row["more_tokens_of_baseline"] else None)
    for title, own in texts.panels():
        more = own[0]["more_tokens_of_baseline"]
        sides = ((f"{more} tokens of text in the prompt", "baseline"), ("the same as memory", "memory"))
        lines = [Line(label, role, [_point(r["batch"], r["values"][role]) for r in own]) for label, role in sides]
        panels.append(Panel(title, "requests at once", "time to first token, ms", lines, "xy"))
    sources += [source for source in texts.sources if source not in sources]
    title, spread = (
        "Time to first token: memory against text in the prompt",
        "median of runs; bars: smallest and largest",
    )
    return Figure("recall-ttft", title, spread, panels, sources) if panels else None


def _first_token(row: dict[str, Any]) -> str:
    return "ttft_ms" if "ttft_ms" in row["metrics"] else "prefill_ms"


ENGINES = "python -m benchmarks.engines"
FIGURES = (
    Wanted(
        "decode-latency",
        "decode latency against batch",
        "engines-",
        decode_latency,
        f"{ENGINES} latency --memory delta explicit --save",
    ),
    Wanted(
        "pool-speedup",
        "pool speed-up against batch",
        ("kernels-", "engines-"),
        pool_speedup,
        f"python -m benchmarks.kernels --ops memory_attention --save  (or {ENGINES} pool --save)",
    ),
    Wanted(
        "scan-time",
        "scan time against length",
        "kernels-",
        scan_time,
        "python -m benchmarks.kernels --ops delta_rule --save",
    ),
    Wanted(
        "step-overhead",
        "step overhead by batch",
        "engines-",
        step_overhead,
        f"{ENGINES} latency --memory delta explicit --save",
    ),
    Wanted(
        "recall-ttft",
        "TTFT of memory recall against text RAG",
        ("rag-", "engines-"),
        recall_ttft,
        f"python -m benchmarks.rag --save  (or {ENGINES} latency --memory text --save)",
    ),
)
