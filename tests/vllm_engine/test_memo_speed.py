"""The whole course of ``benchmarks.memo.speed`` on three real servers of a tiny model."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.memo import speed

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_course_says_every_side_s_figure(lora_bench, monkeypatch):
    kept: list[dict] = []
    monkeypatch.setattr(speed.record, "save", lambda report, name: kept.append(report) or speed.record.ROOT / "x.json")
    options = ["--model", str(lora_bench.model), "--adapter", str(lora_bench.lora), "--rounds", "2", "--save"]
    result = CliRunner().invoke(speed.app, [*options, "--at-once", "3", "--tokens", "4", "--gate", "4"])
    assert result.exit_code == 0, result.output
    (report,) = kept
    assert report["gate"]["equal"] == 4 and {len(values) for values in report["tokens_per_s"].values()} == {2}
    assert all(one["pairs"] == 2 and one["median"] > 0 for one in report["ratios"].values())
    assert "output tokens/s" in result.output and "of the merged model's speed" in result.output
