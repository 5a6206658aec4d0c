"""MeMo on a real SGLang server: one name for both models beside the server's own, which answer as they did."""

from __future__ import annotations

import pytest

from mem_triton.runtime.serving import Serving
from tests.sglang_engine.server import Server
from tests.support.memo_crowd_scenarios import *  # noqa: F403
from tests.support.memo_server_scenarios import *  # noqa: F403
from tests.support.memo_server_scenarios import Start

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def start(lora_bench) -> Start:
    def start(memory: dict, log: str) -> Server:
        """With the options that ``mem-triton serve`` gives."""
        serving = Serving("sglang", str(lora_bench.model), memory, {"memo": lora_bench.lora})
        serving.check()
        command = serving.arguments()
        return Server(
            lora_bench.model,
            log,
            memory,
            flags=command[command.index("mem_triton") + 1 :],
            module="tests.sglang_engine.serve_lora",
            lora_backend="torch_native",
        )

    return start


def test_control_the_stock_handler_answers_an_adapter_s_plain_name_by_the_base(server, stock):
    """Negative control; and any other name is the base model's with a chat model beside it, too."""

    def said(one, **model):
        return one.chat("Who?", 8, **model).json()["choices"][0]["message"]["content"]

    assert said(stock, model="memo") == said(stock) == said(server, model="gpt-4") == said(stock, model="gpt-4")
    assert said(stock, model="m:memo") == said(server, model="memo") != said(stock)


def test_sagemaker_s_route_has_the_same_handler(server, executive):
    body = {"model": "m+memo", "messages": [{"role": "user", "content": "Who?"}], "n": 2}
    answer = server.http.post("/invocations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n", answer.text
