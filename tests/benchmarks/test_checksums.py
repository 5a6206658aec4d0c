"""``benchmarks.store.checksums`` on a few loads, and that it gives no figures for checksums that see nothing."""

from __future__ import annotations

import json

import pytest

from benchmarks.store import checksums
from mem_triton.store.bank import compared, shards


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(checksums, "KEPT", {"memory3": (2, 8), "prefix": (2, 128)})
    monkeypatch.setattr("benchmarks.store.pool.KEPT", checksums.KEPT)
    for module in (checksums, compared):
        monkeypatch.setattr(module, "SETTLED_NS", 0)


def test_loads_are_measured_in_pairs_and_written_in_the_house_s_format(tmp_path, capsys):
    assert checksums.main(["--pairs", "4", "--entries", "4", "--json", str(tmp_path / "checksums.json")]) == 0
    report = json.loads((tmp_path / "checksums.json").read_text())
    assert {"what", "date", "commit", "command", "machine", "versions"} <= report.keys()
    rows = [(row["kind"], row["loads"]) for row in report["rows"]]
    assert rows == [(kind, loads) for kind in ("memory3", "prefix") for loads in ("first", "later")]
    for row in report["rows"]:
        assert row["ratio"]["pairs"] == 4 and row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert "over 4 pairs" in capsys.readouterr().out


def test_checksums_that_find_nothing_get_no_figures(tmp_path, monkeypatch):
    """Negative control: a comparison that is always content."""
    monkeypatch.setattr(shards.np, "array_equal", lambda *_: True)
    with pytest.raises(SystemExit, match="a changed byte was not found"):
        checksums.main(["--pairs", "2", "--entries", "2"])
