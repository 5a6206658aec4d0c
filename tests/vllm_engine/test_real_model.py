"""A real model, SmolLM2-135M-Instruct out of an installed package: made, given documents, and asked over HTTP.

It was not trained with references, so ``mem-triton write`` keeps dense ones, to be read as text of the user's turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mem_triton.store.bank import Bank
from mem_triton.store.pool.plan import Attachment
from tests.support.documents import mem_triton
from tests.support.real_model import smollm2
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine

DOCUMENTS = {
    "ferry": "The ferry to Skell Island leaves from Pier 4 every morning at 7:45. The crossing takes fifty minutes. "
    "Bicycles travel free of charge, and dogs must be kept on a lead.",
    "museum": "The Harlow Museum opened in 1962 in the town of Brenford. Its director is Amelia Voss.",
}
QUESTIONS = {
    "ferry": "From which pier does the ferry to Skell Island leave?",
    "museum": "Who is the director of the Harlow Museum?",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for name, text in DOCUMENTS.items():
        (folder / f"{name}.txt").write_text(text + "\n")
    mem_triton(folder, ["write", str(smollm2()), "BANK", "ferry.txt", "museum.txt", "--quiet"])
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    flags = memory_flags({"memory": {"bank": str(folder / "BANK"), "pool_gib": 0.1, "retrieval": {"top_k": 1}}})
    server = Server(str(smollm2()), str(folder / "log"), [*flags, "--max-model-len", "2048"])
    try:
        yield server.wait()
    finally:
        server.stop()


def ask(server: Server, text: str, fields: dict | None, **others) -> tuple[list[int], dict]:
    answer = server.chat(text, 12, fields, return_token_ids=True, **others)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"], answer.json()


def test_an_entry_is_its_text_in_the_users_turn(server):
    """Tokens are equal, others than without it, and the prompt is that of the question alone."""
    for name, question in QUESTIONS.items():
        memory, answer = ask(server, question, {"mem_ids": [name]})
        text, longer = ask(server, f"{DOCUMENTS[name]}\n{question}", {"mem_ids": []})
        nothing, plain = ask(server, question, {"mem_ids": []})
        assert memory == text != nothing, name
        assert answer["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"] < longer["usage"]["prompt_tokens"]
        assert "head" not in server.report(server.chat(question, 1, {"mem_ids": [name]}))


def test_entries_side_by_side_are_those_of_transformers(server, folder):
    from mem_triton_transformers import TransformersEncoder, read_plans

    encoder = TransformersEncoder.load(str(smollm2()))
    question = QUESTIONS["ferry"]
    ids = encoder.tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    with Bank.open(folder / "BANK") as bank:
        plan = [Attachment(entry.ref) for entry in bank.list()]
        assert len(plan) == 2
        with read_plans(encoder.model, bank, [plan]), torch.inference_mode():
            out = encoder.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    expected = [token for token in out[0, len(ids) :].tolist()]
    assert ask(server, question, {"mem_ids": ["ferry", "museum"]})[0] == expected


def test_what_a_question_is_about_is_found(server):
    for name, question in QUESTIONS.items():
        _, answer = ask(server, question, None)
        (read,) = answer["kv_transfer_params"]["mem_triton"]["references"]
        assert [entry["id"].partition(":")[0] for entry in read["entries"]] == [name]
        assert (read["first_token"], read["end_token"]) == (0, None)
        assert ask(server, question, None)[0] == ask(server, question, {"mem_ids": [name]})[0]


def test_a_chat_with_another_head_keeps_it_and_says_so(server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS["ferry"]}]
    answer = server.chat("", 4, {"mem_ids": ["ferry"]}, messages=messages)
    assert "does not begin with the head" in server.report(answer)["head"]
    assert server.metric("mem_triton:heads_apart_total") == 1
