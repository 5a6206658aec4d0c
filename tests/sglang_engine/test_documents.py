"""The documents' commands for SGLang: every request against a server of the README."""

from __future__ import annotations

import pytest
import yaml

from tests.support.documents import ADAPTER, ALL, MODEL, PAGES, ask_all, blocks, commands, write_bank

pytestmark = pytest.mark.engine

SERVER = "MEM_TRITON_CONFIG=mem.yaml python -m sglang.launch_server --model-path MODEL --attention-backend mem_triton"


def test_the_readmes_server_answers_every_request_of_the_documents(tmp_path, start_server):
    """A server with both memories, over HTTP. The documents start it in one way: with these two options."""
    lines = [line for _, content in blocks("bash", ALL) for line in commands(content)]
    assert {line for line in lines if "sglang.launch_server" in line} == {SERVER}
    ((_, content),) = blocks("yaml", PAGES["README.md"])
    section = yaml.safe_load(content)
    section["memory"]["bank"], section["delta"]["adapter"] = str(write_bank(tmp_path)), str(ADAPTER)
    section["session_dir"] = str(tmp_path / "sessions")
    server = start_server(MODEL, section, context_length=2048)
    assert len(ask_all(server, "custom_params")) > 1
