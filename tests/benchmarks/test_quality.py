"""The quality benchmark: its documents, its scores, and that what is kept of a run is what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.data import attached, load
from benchmarks.quality.scores import exact, f1, interval, plain, says
from mem_triton.ids import is_id

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("quality-*.json"))


def test_the_documents_have_the_answers():
    documents, questions = load()
    assert len(documents) >= 40 and len(questions) >= 100
    assert {d.kind for d in documents.values()} == {"facts", "table", "procedure", "dialogue"}
    assert len({d.language for d in documents.values()}) == 3 and all(map(is_id, documents))
    assert len({q.text for q in questions}) == len(questions)
    for question in questions:
        assert says(documents[question.document].text, question.answers), question
        assert not says(question.text, question.answers), question


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_right_document_is_among_those_attached(count):
    documents, questions = load()
    chosen = attached(questions, documents, count)
    assert chosen == attached(questions, documents, count)
    assert all(len(set(ids)) == count and q.document in ids for ids, q in zip(chosen, questions, strict=True))
    if count > 1:
        assert len({ids.index(q.document) for ids, q in zip(chosen, questions, strict=True)}) == count


def test_scores():
    right = ("Amelia Voss", "Voss")
    assert exact("the Amelia Voss.", right) and not exact("It is Amelia Voss", right)
    assert says("It is Amelia Voss, since 2014.", right) and not says("It is Amelia Vossler.", right)
    assert f1("It is Amelia Voss", right) == pytest.approx(2 * 2 / 6) and f1("nobody", right) == f1("", right) == 0
    assert plain(" L'été, le 11 h ! ") == "l été 11 h"
    low, high = interval([0.0, 1.0] * 50)
    assert low < 0.5 < high and (low, high) == interval([0.0, 1.0] * 50) and interval([1.0] * 9) == (1.0, 1.0)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_figures_follow_from_the_answers_that_were_kept(path):
    report = json.loads(path.read_text())
    _, questions = load()
    for row in report["rows"]:
        said = report["answers"][f"{row['way']}, {row['documents']}"]
        pairs = [(text, q.answers) for text, q in zip(said, questions, strict=True)]
        assert row["asked"] == len(pairs) >= 100
        assert row["says"] == pytest.approx(sum(says(*pair) for pair in pairs) / len(pairs))
        assert row["f1"] == pytest.approx(sum(f1(*pair) for pair in pairs) / len(pairs))
        assert row["exact"] == pytest.approx(sum(exact(*pair) for pair in pairs) / len(pairs))
