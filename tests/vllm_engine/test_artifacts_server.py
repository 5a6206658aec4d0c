"""Trained keys and values over real HTTP: cartridges and peft's adapters answer as transformers does with them."""

from __future__ import annotations

import pytest

from tests.support.trained import Served, trained_entries_are_read_over_http

pytestmark = pytest.mark.engine


def test_trained_entries_are_read_over_http(tmp_path, start_server):
    served = Served(tmp_path)
    server = start_server(served.model, served.section(), ["--chat-template", str(served.template)])
    trained_entries_are_read_over_http(server, served)
    fields = {"ignore_eos": True, "return_token_ids": True}
    (choice,) = server.chat("who?", 12, fields={"mem_ids": ["cartridge"]}, **fields).json()["choices"]
    assert choice["token_ids"] == served.after(served.chat_ids("who?"), "cartridge")
