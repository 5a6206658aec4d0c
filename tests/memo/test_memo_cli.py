"""The command ``mem-triton memo``."""

from __future__ import annotations

import json

import pytest

from benchmarks.memo.world import World
from mem_triton.cli.app import main
from tests.support.documents import PAGES, blocks, commands, mem_triton

TWO_HOP = list(World().two_hop())


def command(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["mem-triton", "memo", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def models(server):
    return "--executive", server.spec("executive"), "--memory", server.spec("memory")


def test_ask_shows_the_turns_and_writes_a_trace_that_replays(server, monkeypatch, capsys, tmp_path):
    asked = TWO_HOP[0]
    arguments = ("ask", asked.question, *models(server), "--greedy", "--trace", tmp_path / "t.json")
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 0 and out == asked.value + "\n"
    assert "seeking, turn 1" in err and f"from 3: {World().sentence(asked.via, asked.relation)[:0]}" in err
    code, again, told = command(monkeypatch, capsys, "replay", tmp_path / "t.json")
    assert code == 0 and again == out and told == err


def test_ask_prints_json(server, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "ask", TWO_HOP[0].question, *models(server), "--json")
    told = json.loads(out)
    assert code == 0 and err == "" and told["result"]["text"] == TWO_HOP[0].value
    assert [item["used"] for item in told["replies"]] == [True, False, True]


def test_ask_with_the_compact_schema(server, monkeypatch, capsys):
    code, out, _ = command(
        monkeypatch, capsys, "ask", TWO_HOP[0].question, *models(server), "--schema", "compact", "--dialect", "paper"
    )
    assert code == 0 and out == TWO_HOP[0].value + "\n"


def test_an_outage_is_exit_code_1_with_its_reason_and_a_trace(server, monkeypatch, capsys, tmp_path):
    server.fault("memory", "400", times=100)
    code, out, err = command(
        monkeypatch, capsys, "ask", TWO_HOP[0].question, *models(server), "--trace", tmp_path / "t.json"
    )
    assert code == 1 and out == "" and "error: the memory model answered none of" in err
    assert json.loads((tmp_path / "t.json").read_text())["result"]["status"] == 502


def test_bad_options_are_one_line_that_names_them(server, monkeypatch, capsys, tmp_path):
    ask = ("ask", "Who?", *models(server))
    cases = [
        ((*ask, "--schema", "large"), "--schema"),
        ((*ask, "--rules", "none"), "--rules"),
        ((*ask, "--dialect", "x"), "--dialect"),
        (("ask", " ", *models(server)), "question: must be a text"),
        ((*ask, "--trace", tmp_path / "none" / "t.json"), "there is no folder"),
        (("ask", "Who?", "--executive", "x", "--memory", "y"), 'write "URL#MODEL"'),
        (("replay", tmp_path / "none.json"), "No such file"),
        ((*ask, "--seconds", "nan"), "--seconds"),
    ]
    for arguments, said in cases:
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, (arguments, err)


def test_commands_of_the_page_run(server, tmp_path, monkeypatch):
    """Those that need two models, here scripted ones."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    titled = [
        content for title, content in blocks("bash", PAGES["memo.md"]) if title == "run by tests/memo/test_memo_cli.py"
    ]
    assert titled
    for line in (line for content in titled for line in commands(content)):
        words = (
            line.replace("http://localhost:8000/v1", server.url)
            .replace("#M ", "#executive ")
            .replace("#memo", "#memory")
        )
        import shlex

        mem_triton(tmp_path, shlex.split(words)[1:])
