"""The real model on SGLang, which reads documents as vLLM does (``tests/vllm_engine/test_real_model.py``)."""

from __future__ import annotations

import pytest

from tests.support.documents import mem_triton
from tests.support.real_model import smollm2

pytestmark = [pytest.mark.engine, pytest.mark.real]

NOTE = "The ferry to Skell Island leaves from Pier 4 every morning at 7:45. The crossing takes fifty minutes."
QUESTION = "From which pier does the ferry to Skell Island leave?"


def test_an_entry_is_its_text_in_the_users_turn(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("real")
    (folder / "ferry.txt").write_text(NOTE + "\n")
    mem_triton(folder, ["write", str(smollm2()), "BANK", "ferry.txt", "--quiet"])
    server = start_server(smollm2(), {"memory": {"bank": str(folder / "BANK"), "pool_gib": 0.1}})
    answers = [
        server.chat(text, 12, fields).json()
        for text, fields in ((QUESTION, {"mem_ids": ["ferry"]}), (f"{NOTE}\n{QUESTION}", None), (QUESTION, None))
    ]
    memory, text, nothing = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert memory == text != nothing
    tokens = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert tokens[0] < tokens[2] < tokens[1]
