"""The documents' commands for vLLM: every server's options, and every request against a server of the README."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mem_triton.config import parse_config
from tests.support.documents import ADAPTER, ALL, MODEL, PAGES, ask_all, blocks, commands, write_bank
from tests.vllm_engine.engine import environment
from tests.vllm_engine.server import Server

SERVERS = [line for _, content in blocks("bash", ALL) for line in commands(content) if line.startswith("vllm serve")]


@pytest.mark.parametrize("line", SERVERS)
def test_options_of_every_server_are_vllms(line):
    """vLLM's own parser takes them; what they say of memory fits the schema."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])
    assert args.load_format == "mem_triton"
    config = parse_config(args.additional_config["mem_triton"])
    assert config.delta or config.memory or config.memoryllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@pytest.mark.engine
def test_the_readmes_server_answers_every_request_of_the_documents(folder):
    """The whole of it: a server as the README starts it, with both memories, over HTTP."""
    places = {"BANK": write_bank(folder), "ADAPTER": ADAPTER, "/var/lib/mem_triton": folder / "sessions"}
    _, _, _, *flags = shlex.split(SERVERS[0])
    for name, path in places.items():
        flags = [flag.replace(f'"{name}"', json.dumps(str(path))) for flag in flags]
    assert str(folder) in "".join(flags)
    server = Server(str(MODEL), str(folder / "log"), [*flags, "--max-model-len", "2048"])
    try:
        server.wait()
        answers = ask_all(server, "vllm_xargs")
    finally:
        server.stop()
    assert len(answers) > 3
    assert any("falcon" in answer for answer in answers), answers


@pytest.mark.slow
@pytest.mark.engine
def test_the_example_in_python_runs(folder):
    for name, path in (("MODEL", MODEL), ("ADAPTER", ADAPTER)):
        (folder / name).symlink_to(path)
    ((_, code),) = blocks("python", PAGES["vllm.md"])
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
