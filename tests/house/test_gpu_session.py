"""The calls of a session on a GPU machine name tests and options that there are, and what would travel is counted."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkout import ROOT


@pytest.fixture
def session() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "scripts/gpu_session.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_call_names_tests_that_there_are(session):
    named = [w for n in session.CALLS for line in session.commands(n, "/out") for w in line if w.startswith("tests/")]
    assert len(named) >= 10
    for name in named:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_every_option_of_the_benchmarks_is_one(session):
    text = (ROOT / "benchmarks/kernels/app.py").read_text()
    for number in session.CALLS:
        for line in session.commands(number, "/out"):
            if "benchmarks.kernels" in line:
                for option in (word for word in line if word.startswith("--")):
                    assert f"{option[2:].replace('-', '_')}:" in text, option


def test_a_call_reports_what_failed_and_goes_on(session, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(session, "install", dict)
    monkeypatch.setattr(session, "commands", lambda number, out: [["false"], ["no-such-command"], ["echo", "there"]])
    assert session.call(1) == 2
    assert (tmp_path / "call1-2.log").read_text() == "there\n" and "FileNotFoundError" in capfd.readouterr().out


def test_too_much_is_refused_before_a_machine_is_asked_for(session, monkeypatch, tmp_path):
    def run(arguments: list, **options: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(arguments, 0, stdout="large\0small\0")

    for name, size in (("large", 900), ("small", 50)):
        (tmp_path / name).write_bytes(b"x" * size)
    for name, value in (("ROOT", tmp_path), ("CARRIED", tmp_path / "carried"), ("LIMIT", 1000)):
        monkeypatch.setattr(session, name, value)
    monkeypatch.setattr(session.subprocess, "run", run)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("vllm-site.tar.xz", "install.sh"):
        Path(bundle / name).write_bytes(b"x" * 40)
    assert session.pack(None, False) == 950
    with pytest.raises(ValueError, match=r"MiB would travel.*large"):
        session.pack(bundle, False)
