"""The demo on a real model: what it counts and shows, and one run of it from start to end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks.common.client import Answer
from benchmarks.demo_real import conversation, documents, report
from benchmarks.quality.data import Question
from tests.support.checkout import ROOT

QUESTIONS = [Question("ferry", "Which pier?", ("Pier 4", "4")), Question("museum", "Who leads it?", ("Voss",))]


def way(name: str, *texts: str, again: bool = False) -> documents.Way:
    answers = [Answer(text, 4, 0.01 * (i + 1), 30) for i, text in enumerate(texts)]
    return documents.Way(name, None, lambda question: (question.text, None), again, answers, answers)


def test_right_answers_are_counted_and_shown():
    ways = [
        way("stock", "Pier 5.", "Mr. Vos"),
        way("bank", "It is Pier 4.", "Amelia Voss"),
        way("warm", "", "", again=True),
    ]
    assert [one.right(QUESTIONS) for one in ways] == [0, 2, 0]
    console = Console(file=(shown := io.StringIO()), width=110)
    report.show_documents(console, ways, QUESTIONS)
    text = shown.getvalue()
    assert "100%  [34%, 100%]" in text and text.count("✗ wrong") == text.count("✓ right") == 1
    row = next(line for line in text.splitlines() if "warm" in line)
    assert "%" not in row and "30" in row and "15" in row, "asked again for its time, not for its answers"


def test_a_conversation_is_judged_by_what_was_told():
    talk = conversation.Talk("Noted.", [("I do not know.", "It is 47."), ("", "Doctor Quist"), ("Biscuit?", "Tom")])
    assert talk.right() == (1, 2)
    for question, answers in conversation.ASKED:
        assert any(answer in conversation.TOLD for answer in answers) and question.endswith("?")
    kept = report.as_json([way("bank", "Pier 4", "Voss")], talk)
    assert json.loads(json.dumps(kept))["conversation"]["right"] == [1, 2]


@pytest.mark.engine
@pytest.mark.real
def test_the_demo_from_start_to_end(tmp_path):
    picture = tmp_path / "demo.svg"
    command = [sys.executable, "-m", "benchmarks.demo_real", "--questions", "3", "--tokens", "4", "--svg", str(picture)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for expected in (
        "vllm serve",
        "43 invented documents",
        "bank, its document by name",
        "started anew",
        "with memory",
    ):
        assert expected in done.stdout, done.stdout
    assert "<svg" in picture.read_text()
