"""The course of ``benchmarks.memo.speed``: no figure without equal answers, and ratios of rounds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import pytest
from rich.console import Console

from benchmarks.common.server import BenchmarkError
from benchmarks.memo import speed
from benchmarks.memo.speed import GateError, Side, check, measure, summary

EQUAL = {"adapter": ["a", "b"], "merged": ["a", "b"], "base": ["a", "x"], "base beside the adapter": ["a", "x"]}


def test_equal_answers_pass_and_each_difference_is_named():
    assert check(EQUAL) == {"questions": 2, "equal": 2, "base_equal_to_adapter": 1}
    for side, answers, said in (
        ("merged", ["a", "c"], "1 of 2 questions alike; the first others: .'b', 'c'."),
        ("base beside the adapter", ["a", "b"], "the base answers 1 of 2"),
    ):
        with pytest.raises(GateError, match=said):
            check({**EQUAL, side: answers})
    silent = {side: EQUAL["adapter"] for side in EQUAL}
    with pytest.raises(GateError, match="changes no answer"):
        check(silent)


def test_ratios_are_those_of_rounds_and_not_of_medians():
    """A machine that becomes slower in the middle changes no ratio."""
    found = {"base": [100.0, 50.0, 10.0], "base beside the adapter": [100.0, 50.0, 10.0]}
    found |= {"merged": [100.0, 50.0, 10.0], "adapter": [30.0, 15.0, 3.0]}
    told = summary(found)
    assert told["ratios"]["adapter / merged"] == {
        **dict.fromkeys(("median", "low", "high", "min", "max"), pytest.approx(0.3)),
        "pairs": 3,
    }
    assert told["sides"]["adapter"] == {"median": 15.0, "min": 3.0, "max": 30.0}


@dataclass(frozen=True)
class Place:
    name: str
    url: str


def asked(monkeypatch, reply):
    """(what the gate saw, figures, who was asked, in order) of a course of three rounds on scripted servers."""
    seen = []

    def answer(request):
        import json

        body = json.loads(request.content)
        seen.append((request.url.host, body["model"], body["ignore_eos"]))
        text = reply(request.url.host, body["model"])
        usage = {"completion_tokens": body["max_tokens"]}
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}], "usage": usage})

    client = httpx.AsyncClient
    monkeypatch.setattr(speed, "REST", 0)
    monkeypatch.setattr(
        speed.httpx, "AsyncClient", lambda **options: client(transport=httpx.MockTransport(answer), **options)
    )
    base, adapter, merged = (Place(name, f"http://{name}") for name in ("base", "adapter", "merged"))
    sides = {
        "base": Side(base, "M"),
        "base beside the adapter": Side(adapter, "M"),
        "adapter": Side(adapter, "memo"),
        "merged": Side(merged, "M"),
    }
    return *asyncio.run(measure(Console(quiet=True), sides, (4, 8, 3, 2))), seen


def test_sides_are_measured_in_turns_behind_the_gate(monkeypatch):
    compared, found, seen = asked(monkeypatch, lambda host, model: "m" if host == "merged" or model == "memo" else "b")
    assert compared["equal"] == 2 and {name: len(values) for name, values in found.items()} == dict.fromkeys(EQUAL, 3)
    assert [whole for *_, whole in seen] == [False] * 8 + [True] * (4 * 4 * 4), "a warm-up and three rounds"
    turns = [seen[8 + 4 * turn][:2] for turn in range(16)]
    assert turns[:4] == turns[4:8][::-1] == turns[8:12] and len(set(turns[:4])) == 4


def test_no_speed_is_measured_of_answers_that_differ(monkeypatch):
    with pytest.raises(GateError, match="0 of 2"):
        asked(monkeypatch, lambda host, model: host)
    assert issubclass(GateError, BenchmarkError), "it is told in a line, with exit code 1"
