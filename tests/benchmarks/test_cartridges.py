"""The benchmark of cartridges: what it asks, and that what is kept of a run is what was replied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cartridges import app as cartridges
from benchmarks.quality.scores import says
from tests.support.models import tiny_model, tiny_tokenizer

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("cartridges-*.json"))


def test_a_small_run_scores_every_way(tmp_path, capsys, monkeypatch):
    """With questions of the shipped documents; two sizes learn from the same ones."""
    folder, told = tmp_path / "model", []
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    texts, questions = cartridges.chosen(2)
    document, held_out = cartridges.write_inputs(tmp_path / "out", texts, questions)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": f"{word}?"}) + "\n" for word in ("who", "when", "where", "why")))
    for rows in (8, 12):
        options = {"rows": rows, "steps": 1, "asked": 4, "dtype": "float32", "questions": own, "answer-tokens": 4}
        report = cartridges.trained(folder, document, held_out, tmp_path / f"rows-{rows}", options)
        told.append(cartridges.scored(report, questions))
    assert [one["rows"] for one in told] == [8, 12] and all(one["asked"] == len(questions) == 6 for one in told)
    assert all(set(one["ways"]) == set(cartridges.WAYS) for one in told)
    cartridges.show(cartridges.Console(), told)
    assert "0 of 6" in capsys.readouterr().out, "a random model knows nothing"
    with pytest.raises(cartridges.BenchmarkError, match="failed"):
        cartridges.trained(folder, document, held_out, tmp_path / "x", {"rows": 0})


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_figures_follow_from_the_replies_that_were_kept(path):
    report = json.loads(path.read_text())
    texts, questions = cartridges.chosen(len(report["documents"]))
    assert [one.id for one in texts] == report["documents"]
    for run in report["runs"]:
        for way, found in run["ways"].items():
            pairs = zip(run["replies"], questions, strict=True)
            assert found["right"] == sum(says(reply[way], question.answers) for reply, question in pairs)
