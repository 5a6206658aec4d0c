"""Trained keys and values over real HTTP: cartridges and peft's adapters answer as transformers does with them."""

from __future__ import annotations

import pytest

from tests.support.trained import Served, trained_entries_are_read_over_http
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


def test_trained_entries_are_read_over_http(tmp_path):
    served = Served(tmp_path)
    flags = [*memory_flags(served.section()), "--chat-template", str(served.template)]
    server = Server(str(served.model), str(tmp_path / "server.log"), flags)
    try:
        server.wait()
        trained_entries_are_read_over_http(server, served)
        fields = {"ignore_eos": True, "return_token_ids": True}
        (choice,) = server.chat("who?", 12, fields={"mem_ids": ["cartridge"]}, **fields).json()["choices"]
        assert choice["token_ids"] == served.after(served.chat_ids("who?"), "cartridge")
    finally:
        server.stop()
