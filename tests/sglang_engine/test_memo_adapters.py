"""The shipped memory adapter on SGLang, against the merged model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sglang_engine.server import Server
from tests.support.memo_adapter_scenarios import *  # noqa: F403
from tests.support.memo_adapter_scenarios import SHIPPED
from tests.support.real_model import smollm2

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(
        smollm2(),
        str(tmp_path_factory.mktemp("memo") / "log"),
        {"memo": {"memory": "memo", "executive": "m", "name": "m+memo"}},
        flags=["--enable-lora", "--max-lora-rank", "16", "--lora-paths", f"memo={SHIPPED / 'memory'}"],
        module="tests.sglang_engine.serve_lora",
        lora_backend="torch_native",
    )
    try:
        yield server.wait()
    finally:
        server.stop()
