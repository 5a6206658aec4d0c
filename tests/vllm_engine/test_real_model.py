"""A real model, SmolLM2-135M-Instruct out of an installed package: made, given a document, and asked over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.documents import mem_triton
from tests.support.real_model import smollm2
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine

NOTE = (
    "The ferry to Skell Island leaves from Pier 4 every morning at 7:45. The crossing takes fifty minutes. Bicycles "
    "travel free of charge, and dogs must be kept on a lead.\n"
)
HEAD = "<|im_start|>system\nYou answer in a few words.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (
    "From which pier does the ferry to Skell Island leave?",
    "How long does the crossing to Skell Island take?",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("real")
    model = smollm2()
    (folder / "ferry.txt").write_text(NOTE)
    mem_triton(folder, ["write", str(model), "BANK", "ferry.txt", "--kind", "prefix", "--quiet"])
    flags = memory_flags({"memory": {"bank": str(folder / "BANK"), "pool_gib": 0.1}})
    server = Server(str(model), str(folder / "log"), [*flags, "--max-model-len", "2048"])
    try:
        yield server.wait()
    finally:
        server.stop()


def test_an_entry_is_its_text_in_front_of_the_prompt(server):
    """The answers' tokens are the same, and others than without it."""
    for question in QUESTIONS:
        prompt = HEAD + question + TAIL
        texts = {
            "memory": server.complete(prompt, 12, {"mem_ids": ["ferry"]}, ignore_eos=False),
            "text": server.complete(NOTE + prompt, 12, ignore_eos=False),
            "nothing": server.complete(prompt, 12, ignore_eos=False),
        }
        answers = {name: answer.json()["choices"][0]["token_ids"] for name, answer in texts.items()}
        assert answers["memory"] == answers["text"] != answers["nothing"]
