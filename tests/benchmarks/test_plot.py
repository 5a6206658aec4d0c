"""``python -m benchmarks.plot`` on result files made up here: what is drawn, what is missing, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.plot.app import main

BATCHES = (1, 16, 64)
XLINK, SVG = "{http://www.w3.org/1999/xlink}href", "{http://www.w3.org/2000/svg}"


def run(*arguments: object, code: int = 0) -> str:
    """What a run prints; of one that ends with exit code 2, what it says on stderr, and nothing else."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["benchmarks.plot", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert end.value.code == code, (out.getvalue(), err.getvalue())
    if code == 2:
        assert out.getvalue() == "" and "Traceback" not in err.getvalue()
        return err.getvalue()
    return out.getvalue()


def refused(*arguments: object) -> str:
    """The one line that says what is wrong."""
    (line,) = run(*arguments, code=2).splitlines()
    assert line.startswith("python -m benchmarks.plot: ")
    return line


def head(date: str = "2026-11-21T10:00:00+00:00", gpu: str | None = None) -> dict[str, Any]:
    machine = {"cpu": "Test CPU", "cores": 2, "gpu": gpu, "system": "Linux"}
    return {
        "what": "-",
        "date": date,
        "commit": "0123456789abcdef",
        "changed_files": [],
        "command": "-",
        "machine": machine,
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
    }


def row(memory: str, batch: int, slower: float = 1.25, metric: str = "decode_ms", **fields: Any) -> dict[str, Any]:
    baseline = [10.0 + batch, 11.0 + batch, 12.0 + batch]
    speed = {"median": 1 / slower, "low": 0.95 / slower, "high": 1.05 / slower, "min": 0.9, "max": 1.1, "pairs": 3}
    values = {"baseline": baseline, "memory": [slower * x for x in baseline], "speed": speed}
    return {
        "part": "latency",
        "comparison": memory,
        "memory": memory,
        "baseline": "stock",
        "more_tokens_of_baseline": 0,
        "batch": batch,
        "context": 128,
        "output": 32,
        "gate": "green",
        "floor_ms": 5.0,
        "metrics": {metric: values},
        **fields,
    }


def engines(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {**head(**fields), "engine": "vllm", "model": {"name": "qwen3-100m"}, "rows": rows, "gates": {}}


def kernels() -> dict[str, Any]:
    def kernel(op: str, series: str, variant: str, us: float, note: str = "", **sizes: int) -> dict[str, Any]:
        return {
            "op": op,
            "case": f"{series} {sizes}",
            "series": series,
            "variant": variant,
            "baseline": variant not in ("ours", "fused"),
            "models": "qwen3-8b llama3-8b",
            "dtype": "bf16",
            "note": note,
            "status": "ok",
            "us": us,
            "us_p10": 0.9 * us,
            "us_p90": 1.2 * us,
            "floor_us": us / 3,
            **sizes,
        }

    rows = []
    for batch in BATCHES:
        sizes = {"batch": batch, "queries": 1, "shared": 12800}
        alone = batch == 1  # where the policy takes the other way
        fused, note = 20.0 * batch, "the policy's choice"
        rows.append(kernel("memory_attention", "pool_batch", "fused", fused, note if alone else "", **sizes))
        rows.append(kernel("memory_attention", "pool_batch", "ours", 20.0, "" if alone else note, **sizes))
        rows.append(kernel("memory_attention", "pool_batch", "as prefix: vllm triton", 10.0 * batch, **sizes))
        rows.append(kernel("memory_attention", "pool_batch", "context: vllm triton", 5.0, **sizes))
    for tokens in (128, 1024, 8192, 32768):
        rows.append(kernel("delta_rule", "scan_length", "ours", 5.0, batch=1, queries=tokens))
        rows.append(kernel("delta_rule", "scan_length", "official scan", 0.4 * tokens, batch=1, queries=tokens))
    wrong = {**rows[-1], "variant": "a wrong one", "status": "WRONG", "us": None}
    return {**head(), "rows": [*rows, wrong]}


def rag() -> dict[str, Any]:
    def side(right: int, tokens: float, ttft: float) -> dict[str, Any]:
        return {
            "right": right,
            "asked": 33,
            "prompt_tokens": tokens,
            "ttft": [ttft, 1.1 * ttft],
            "ttft_alone": [ttft / 4, ttft / 3],
        }

    sides = {"text RAG": side(32, 494, 0.4), "explicit memory": side(31, 22, 0.2), "no evidence": side(0, 22, 0.2)}
    return {**head(), "requests_at_once": 8, "sides": sides}


def write(folder: Path, **reports: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, report in reports.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(report))
    return folder


def everything() -> dict[str, dict[str, Any]]:
    rows = [row(memory, batch) for memory in ("delta", "explicit") for batch in BATCHES]
    rows += [row("pool", batch, 0.5, comparison="shared pool", baseline="pool per request") for batch in BATCHES]
    rows += [
        row("explicit", batch, 0.5, "prefill_ms", comparison="memory instead of text", more_tokens_of_baseline=640)
        for batch in BATCHES
    ]
    return {"engines_vllm_cpu_1": engines(rows), "kernels_cpu_1": kernels(), "rag_cpu_1": rag()}


class Drawn:
    """An SVG: the texts in it, and the points of each line."""

    def __init__(self, path: Path) -> None:
        root = ElementTree.parse(path).getroot()
        self.texts = [element.text for element in root.iter(f"{SVG}text")]
        self.points = {
            group.get("id"): len([use for use in group.iter(f"{SVG}use") if use.get(XLINK)])
            for group in root.iter(f"{SVG}g")
            if re.fullmatch(r"panel-\d-line-\d", group.get("id", ""))
        }
        self.dashed = [name for name, points in self.points.items() if not points]

    def has(self, words: str) -> bool:
        return any(words in (text or "") for text in self.texts)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Drawn]:
    folder = tmp_path_factory.mktemp("plot")
    out = run(write(folder / "results", **everything()), "--out", folder / "figures")
    assert out.count(".svg and .png") == 5 and "not drawn" not in out
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in (folder / "figures").glob("*.png"))
    assert len(list((folder / "figures").iterdir())) == 10
    return {path.stem: Drawn(path) for path in (folder / "figures").glob("*.svg")}


LABELS = {
    "decode-latency": ("stock", "δ-mem", "explicit memory, 5 references", "floor: bytes and flops of stock"),
    "pool-speedup": ("than vllm triton, pool read per request", "than a pool that each request reads"),
    "scan-time": ("mem_triton", "official scan", "floor: bytes and flops"),
    "step-overhead": ("δ-mem", "explicit memory, 5 references"),
    "recall-ttft": (
        "text RAG: 494 prompt tokens, 32 of 33 right",
        "explicit memory: 22 prompt tokens, 31 of 33 right",
        "640 tokens of text in the prompt",
        "the same as memory",
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_each_figure_has_its_labels_and_its_small_print(drawn, name):
    for label in (*LABELS[name], "Test CPU, 2 cores (a CPU: says nothing about a GPU)", "vllm 0.32.0", "2026-11-21"):
        assert drawn[name].has(label), (label, drawn[name].texts)
    assert drawn[name].has("bars: "), "what the spread is"


def test_each_line_has_its_points(drawn):
    assert drawn["decode-latency"].points == {f"panel-0-line-{i}": (3, 3, 3, 0)[i] for i in range(4)}
    assert drawn["step-overhead"].points == {"panel-0-line-0": 3, "panel-0-line-1": 3}
    assert drawn["scan-time"].points == {"panel-0-line-0": 4, "panel-0-line-1": 4, "panel-0-line-2": 0}
    assert drawn["pool-speedup"].points == {"panel-0-line-0": 3, "panel-1-line-0": 3}
    assert drawn["recall-ttft"].points == {"panel-1-line-0": 3, "panel-1-line-1": 3}, "the first panel has bars"
    assert not drawn["scan-time"].has("a wrong one"), "its gate is red"
    assert not drawn["pool-speedup"].has("than context"), "that kernel does not read the pool"


def test_points_are_what_was_measured():
    from benchmarks.plot.data import FIGURES, make_figure

    reports = [{**report, "file": f"{name.replace('_', '-')}.json"} for name, report in everything().items()]
    figures = {wanted.name: make_figure(wanted, reports, None) for wanted in FIGURES}
    stock, delta, _, floor = figures["decode-latency"].panels[0].lines
    assert stock.points[1] == (16, 27.0, 26.0, 28.0) and delta.points[0] == (1, 15.0, 13.75, 16.25)
    assert floor.points[0].y == 5.0
    overhead = figures["step-overhead"].panels[0].lines[0].points[0]
    assert overhead.y == pytest.approx(25) and overhead.low < 25 < overhead.high
    layer, step = (panel.lines[0].points for panel in figures["pool-speedup"].panels)
    assert layer[2] == (64, 32.0, pytest.approx(32 * 0.9 / 1.2), pytest.approx(32 * 1.2 / 0.9)) and step[0].y == 2.0


def test_two_pairs_have_no_interval(tmp_path):
    few = row("delta", 16)
    few["metrics"]["decode_ms"]["speed"] |= {"low": None, "high": None}
    run(write(tmp_path / "results", engines_a=engines([few])), "--out", tmp_path / "figures")
    assert Drawn(tmp_path / "figures" / "step-overhead.svg").points == {"panel-0-line-0": 1}


def test_missing_data_is_named_with_its_command(tmp_path):
    folder = write(tmp_path / "results", rag_cpu_1=rag(), other={"nothing": 1}, bank_1={**head(), "machine": {}})
    out = run(folder, "--out", tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["recall-ttft.png", "recall-ttft.svg"]
    lines = [line for line in out.splitlines() if line.startswith("not drawn: ")]
    assert len(lines) == 4 and all("python -m benchmarks." in line for line in lines), out
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--out", tmp_path / "none", code=1).count("not drawn") == 5
    assert not (tmp_path / "none").exists()


def test_no_point_of_a_red_gate(tmp_path):
    red = engines([{**row("delta", 1), "gate": "red", "metrics": {}}, {**row("delta", 16), "gate": "red"}])
    out = run(write(tmp_path / "results", engines_vllm_cpu_1=red), "--out", tmp_path / "figures", code=1)
    assert "not drawn: decode latency" in out


def test_newer_files_win_and_machines_do_not_mix(tmp_path):
    day = "2026-11-{}T00:00:00+00:00".format
    folder = write(
        tmp_path / "results",
        engines_a=engines([row("delta", 1, 9.0), row("delta", 64)], date=day(20)),
        engines_b=engines([row("delta", 1), row("delta", 16)], date=day(21)),
        engines_gpu=engines([row("delta", 4)], date=day(19), gpu="A GPU"),
    )
    run(folder, "--out", tmp_path / "cpu", "--machine", "cpu")
    figure = Drawn(tmp_path / "cpu" / "step-overhead.svg")
    assert figure.points == {"panel-0-line-0": 3} and figure.has("engines-a.json") and figure.has("engines-b.json")
    assert not figure.has("A GPU")
    run(folder, "--out", tmp_path / "any")
    figure = Drawn(tmp_path / "any" / "step-overhead.svg")
    assert figure.points == {"panel-0-line-0": 1} and figure.has("A GPU") and not figure.has("Test CPU")


def test_what_cannot_be_plotted_is_one_line(tmp_path, monkeypatch):
    assert "no such file" in refused(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[1")
    assert "x.json: no result file" in refused(tmp_path / "x.json")
    assert "--machine" in refused(tmp_path, "--machine", "tpu")
    folder = write(tmp_path / "results", rag_cpu_1=rag())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "mem-triton[plot]"' in refused(folder, "--out", tmp_path / "figures")
