"""The documents' commands for SGLang: every request against a server of the README."""

from __future__ import annotations

import argparse
import shlex

import pytest
import yaml
from sglang.srt.server_args import ServerArgs

from tests.support.documents import ADAPTER, ALL, MODEL, PAGES, ask_all, blocks, commands, write_bank

pytestmark = pytest.mark.engine

SERVER = "MEM_TRITON_CONFIG=mem.yaml python -m sglang.launch_server --model-path MODEL --attention-backend mem_triton"
SERVERS = {line for _, content in blocks("bash", ALL) for line in commands(content) if "sglang.launch_server" in line}


@pytest.mark.parametrize("line", sorted(SERVERS))
def test_options_of_every_server_are_sglangs(line):
    """All begin as the README's does; what follows is SGLang's own."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert line.startswith(SERVER)
    parser.parse_args(["--model-path", "MODEL", *shlex.split(line.removeprefix(SERVER))])


def test_the_readmes_server_answers_every_request_of_the_documents(tmp_path, start_server):
    """A server with both memories, over HTTP."""
    assert SERVER in SERVERS
    ((_, content),) = blocks("yaml", PAGES["README.md"])
    section = yaml.safe_load(content)
    section["memory"]["bank"], section["delta"]["adapter"] = str(write_bank(tmp_path)), str(ADAPTER)
    section["session_dir"] = str(tmp_path / "sessions")
    server = start_server(MODEL, section, context_length=2048)
    assert len(ask_all(server, "custom_params")) > 1
