"""What was measured, as rows for a file, lines for a spreadsheet, and a table for people."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.engines.commands import Cell
from benchmarks.engines.memories import Comparison
from benchmarks.engines.pairs import ratio

RATES = ("output_tokens_per_s",)
TITLES = {
    "output_tokens_per_s": "output tokens/s",
    "decode_ms": "decode step, ms",
    "prefill_ms": "prefill, ms",
    "latency_ms": "whole batch, ms",
    "ttft_ms": "TTFT, ms",
}
COLUMNS = (
    "engine",
    "part",
    "comparison",
    "memory",
    "baseline",
    "batch",
    "context",
    "output",
    "metric",
    "baseline_median",
    "memory_median",
    "speed",
    "low",
    "high",
    "min",
    "max",
    "pairs",
    "floor_ms",
    "gate",
    "gate_error",
)


def row(
    part: str,
    comparison: Comparison,
    cell: Cell,
    found: dict[str, list[dict[str, float]]],
    gate: dict[str, Any],
    floor_ms: float,
) -> dict[str, Any]:
    """One cell of a comparison. Of a cell whose gate is red nothing that was measured is kept.

    metrics: name -> every pair's values, in order, and ``speed``: how much faster memory is, above 1 if it is (the
    baseline's time over memory's, or memory's rate over the baseline's).
    """
    metrics = {}
    if gate["gate"] == "green" and found["baseline"]:
        for name in found["baseline"][0]:
            pairs = [(b[name], m[name]) for b, m in zip(found["baseline"], found["memory"], strict=True)]
            pairs = [pair for pair in pairs if all(math.isfinite(x) for x in pair)]
            if not pairs:
                continue
            baseline, memory = map(list, zip(*pairs, strict=True))
            speed = ratio(baseline, memory) if name in RATES else ratio(memory, baseline)
            metrics[name] = {"baseline": baseline, "memory": memory, "speed": asdict(speed)}
    return {
        "part": part,
        "comparison": comparison.name,
        "memory": comparison.memory,
        "baseline": comparison.baseline,
        "more_tokens_of_baseline": comparison.more,
        **asdict(cell),
        "metrics": metrics,
        "floor_ms": floor_ms,
        "gate": gate["gate"],
        "gate_reason": gate.get("reason", ""),
    }


def lines(report: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The report flat: a line a metric; a cell without figures is a line, too."""
    for r in report["rows"]:
        same = {name: r[name] for name in COLUMNS if name in r} | {"engine": report["engine"]}
        gate = report["gates"].get(r["memory"], {})
        same["gate_error"] = gate.get("error")
        for name, values in r["metrics"].items() or (("", None),):
            line = dict(same, metric=name)
            if values:
                speed = dict(values["speed"])
                line |= {"speed": speed.pop("median"), **speed}
                line |= {f"{side}_median": statistics.median(values[side]) for side in ("baseline", "memory")}
            yield line


def save_csv(report: dict[str, Any], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for line in lines(report):
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})


def show(console: Console, report: dict[str, Any]) -> None:
    """Ratios with their spread; of a red cell the reason alone."""
    machine = report["machine"]
    where = machine["gpu"] or f"a CPU ({machine['cpu']}, {machine['cores']} cores): says nothing about a GPU"
    title = f"{report['engine']}, {report['model']['name']}, on {where}"
    table = Table(
        "tool",
        "against",
        "batch",
        "context",
        "figure",
        "baseline",
        "memory",
        "speed [95 %]",
        "min … max",
        "pairs",
        title=title,
        box=box.SIMPLE_HEAD,
    )
    for r in report["rows"]:
        head = [r["part"], f"{r['memory']} / {r['baseline']}", str(r["batch"]), str(r["context"])]
        if r["gate"] != "green":
            table.add_row(*head, f"[red]gate red: {r['gate_reason']}")
        for name, values in r["metrics"].items():
            s = values["speed"]
            table.add_row(
                *head,
                TITLES.get(name, name),
                *(f"{statistics.median(values[k]):.4g}" for k in ("baseline", "memory")),
                f"{s['median']:.3f} " + ("" if s["low"] is None else f"[{s['low']:.3f}, {s['high']:.3f}]"),
                f"{s['min']:.3f} … {s['max']:.3f}",
                str(s["pairs"]),
            )
    console.print(table)
    for name, held in report["memory_held"].items():
        words = [f"{held['resident_gib']:.2f} GiB resident"] if "resident_gib" in held else []
        words += [f"{held['gpu_gib']:.1f} GiB of the GPU"] if "gpu_gib" in held else []
        words += [f"room for {held['kv_cache_tokens']:,} tokens of KV cache"] if held.get("kv_cache_tokens") else []
        console.print(f"{name}: {', '.join(words)}")
    for line in report["missing"]:
        console.print(f"[yellow]missing:[/] {escape(line)}")
