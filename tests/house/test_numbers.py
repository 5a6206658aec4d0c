"""Figures in the README and in docs/benchmarks.md are those of the result files that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.support.documents import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"


def found(data: Any, key: str) -> Iterator[Any]:
    """Every value of ``key`` in a JSON document, however deep."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key:
                yield value
            yield from found(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from found(value, key)


def recalls(name: str) -> set[str]:
    """Shares of right answers, in percent; a file of quality also has F1 scores, with their intervals."""
    keys = ("recall",) if name.startswith("recall") else ("says", "f1", "f1_interval")
    data = json.loads((RESULTS / name).read_text())
    values = [value for key in keys for value in found(data, key)]
    shares = [share for value in values for share in (value if isinstance(value, list) else [value])]
    return {f"{100 * share:.1f}" for share in shares}


def speeds(name: str) -> set[tuple[str, str, str]]:
    figures = found(json.loads((RESULTS / name).read_text()), "speed")
    return {tuple(f"{speed[part]:.2f}" for part in ("median", "low", "high")) for speed in figures}


def test_results_of_the_readme():
    rows = PAGES["README.md"].split("| what | with memory | against |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(rows) > 5
    for row in rows:
        _, mine, against, file = row.strip().strip("|").split("|")
        name = re.search(r"`([\w-]+\.json)`", file)[1]
        if name.startswith(("recall", "quality")):
            shares = re.findall(r"\d+\.\d", mine) + re.findall(r"(\d+\.\d) %", against)
            assert shares and set(shares) <= recalls(name), row
        else:
            medians = re.findall(r"\d+\.\d\d", mine)
            assert medians and set(medians) <= {median for median, _, _ in speeds(name)}, row


def test_speeds_of_the_benchmarks_page():
    page = PAGES["benchmarks.md"]
    told = re.findall(r"\| (\d+\.\d\d) \[(\d+\.\d\d), (\d+\.\d\d)\] \|", page)
    named = re.findall(r"engines-\w+-cpu-[\w-]+\.json", page)
    measured = set().union(*map(speeds, named))
    assert len(told) > 5 and set(told) <= measured, set(told) - measured


def test_recalls_of_the_benchmarks_page():
    recall = PAGES["benchmarks.md"].split("## Recall", 1)[1].split("## Speed", 1)[0]
    rows = "\n".join(line for line in recall.splitlines() if line.startswith("|"))
    told = set(re.findall(r"\d+\.\d", rows))
    files = [path.name for kind in ("recall", "quality") for path in RESULTS.glob(f"{kind}*.json")]
    measured = set().union(*map(recalls, files))
    assert len(told) > 15 and told <= measured, told - measured


def test_a_number_that_no_file_has_would_be_seen():
    assert "12.3" not in recalls("recall-2026-11-21.json") and "99.7" in recalls("recall-2026-11-21.json")
