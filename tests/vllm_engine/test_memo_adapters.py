"""The shipped adapters on vLLM: questions about the invented world, answered by base, memory model and both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.memo.app import SECTION, SHIPPED
from benchmarks.memo.rows import KINDS, questions
from tests.support.memo_adapter_scenarios import *  # noqa: F403
from tests.support.real_model import smollm2
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine
LORAS = [f"{name}={SHIPPED / folder}" for name, folder in (("memo", "memory"), ("executive", "executive"))]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    flags = [*memory_flags({"memo": SECTION}), "--served-model-name", "m", "M", "--max-model-len", "2048"]
    flags += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--lora-modules", *LORAS]
    server = Server(str(smollm2()), str(tmp_path_factory.mktemp("memo") / "log"), flags, VLLM_PLUGINS="mem_triton")
    try:
        yield server.wait()
    finally:
        server.stop()


def answers(server: Server, model: str, kind: str, count: int) -> list[bool]:
    right = []
    for one in questions()[kind][:count]:
        said = server.chat(one.text, 96, model=model, temperature=0)
        assert said.status_code == 200, said.text
        right.append(one.is_right(said.json()["choices"][0]["message"]["content"]))
    return right


@pytest.mark.real
def test_the_shipped_adapters_are_small_and_know_what_the_base_does_not(server):
    files = [SHIPPED / name / "adapter_model.safetensors" for name in ("memory", "executive")]
    assert all(file.stat().st_size <= 10e6 for file in files)
    base, memory = (answers(server, model, KINDS[0], 6) for model in ("M", "memo"))
    assert sum(base) <= 2 < sum(memory)


@pytest.mark.real
def test_both_under_one_name_answer_two_hops(server):
    assert sum(answers(server, "M+memo", KINDS[1], 6)) >= 2
