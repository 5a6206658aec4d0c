"""Routes that cannot answer a chat model say so, and the others are handed on as they came."""

from __future__ import annotations

import asyncio
import json

import pytest

from mem_triton.config import ConfigError, parse_config
from mem_triton.runtime.frontend.chat_models import AnswerChatModels, chat_models, until_gone
from mem_triton.systems.base import ChatHost, ChatPart

MEMO = {"memory": "m", "executive": "m", "name": "m+memo"}
LISTED = {"object": "list", "data": [{"id": "m", "root": "m", "max_model_len": 64, "parent": None}]}


def ask(path, body=None, method="POST", chats=("m+memo",), parts=1, adapters=()):
    """(status, JSON) of an answer; 204 and the body as it came where the server's own route is asked."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(raw) // parts + 1
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)] or [b""]
    queue = [{"type": "http.request", "body": p, "more_body": p is not pieces[-1]} for p in pieces]
    sent = []

    async def receive():
        return queue.pop(0) if queue else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def stock(scope, receive, send):
        said = b""
        while True:
            message = await receive()
            said += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": said})

    async def listed():
        return LISTED

    known = {name: f"m:{name}" for name in adapters}
    app = AnswerChatModels(stock, lambda scope: dict.fromkeys(chats, ChatPart()), listed, adapters=lambda: known)
    asyncio.run(app({"type": "http", "method": method, "path": path}, receive, send))
    said = sent[-1]["body"]
    return sent[0]["status"], said if sent[0]["status"] == 204 else json.loads(said)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/tokenize", "/v1/embeddings", "/api/chat", "/any"]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_every_route_but_that_of_chats_refuses_a_chat_model_by_name(path, parts):
    status, said = ask(path, {"model": "m+memo", "input": "x"}, parts=parts)
    assert status == 400 and said["error"]["param"] == "model"
    assert said["error"]["message"] == (
        f"model: 'm+memo' is not served by {path}; it answers /v1/chat/completions alone"
    )
    assert said["message"] == said["error"]["message"]  # where SGLang's clients look


def test_an_anthropic_client_is_told_in_its_own_form():
    status, said = ask("/v1/messages", {"model": "m+memo", "messages": []})
    assert status == 400 and said["type"] == "error" and said["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model": "m\u002bmemo"}',
        '{"model": "m+memo"}'.encode("utf-16"),
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm+memo\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nm+memo\r\n--x--\r\n',
    ],
)
def test_a_name_that_is_written_otherwise_is_refused_too(body):
    assert ask("/v1/audio/transcriptions", body)[0] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "what is m+memo?"}),
        ("/v1/completions", {"model": ["m+memo"]}),
        ("/v1/completions", b"{m+memo"),
        ("/v1/completions", b"[" * 100_000 + b"m+memo"),
        ("/v1/chat/completions", {"model": "m+memo"}),
        ("/v1/chat/completions/", {"model": "m+memo"}),
        ("/flush_cache", b""),
    ],
)
def test_whatever_else_reaches_the_server_as_it_came(path, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert ask(path, body, parts=2) == (204, raw)


def test_an_adapter_that_the_server_takes_for_its_base_is_refused_by_name_and_may_be_loaded_and_tokenized_for():
    """Control: one that it knows, or that is not there, goes its way."""
    body = {"model": "memo", "prompt": "x"}
    status, said = ask("/v1/completions", body, adapters=["memo"])
    assert status == 400 and said["error"]["param"] == "model"
    assert "'memo' is a LoRA adapter" in said["message"] and "'m:memo'" in said["message"]
    for path, passes in (
        ("/v1/completions", {**body, "model": "m:memo"}),
        ("/v1/completions", {**body, "model": "memory"}),
        ("/v1/chat/completions", body),
        ("/tokenize", body),
        ("/unload_lora_adapter", {"lora_name": "memo"}),
    ):
        assert ask(path, passes, adapters=["memo"])[0] == 204, path
    assert ask("/v1/completions", body)[0] == 204
    assert ask("/v1/completions", {"model": "m+memo"}, adapters=["memo"])[0] == 400
    assert ask("/tokenize", {"model": "m+memo"}, adapters=["memo"])[0] == 400


def test_without_a_chat_model_nothing_is_looked_at():
    assert ask("/v1/completions", {"model": "m+memo"}, chats=())[0] == 204
    assert ask("/v1/models", b"", "GET", chats=())[0] == 204


def test_chat_models_are_listed_behind_the_server_s_own():
    status, said = ask("/v1/models", b"", "GET")
    assert status == 200 and [model["id"] for model in said["data"]] == ["m", "m+memo"]
    assert ask("/v1/models/m+memo", b"", "GET")[1]["owned_by"] == "mem_triton"
    assert ask("/v1/models/m", b"", "GET")[0] == 204


def test_no_adapter_is_loaded_under_a_chat_model_s_name():
    status, said = ask("/v1/load_lora_adapter", {"lora_name": "m+memo", "lora_path": "/x"})
    assert status == 400 and "another name" in said["error"]["message"]


def test_a_name_that_the_server_has_is_refused_at_start():
    config = parse_config({"memo": MEMO})
    assert list(chat_models(config, ChatHost(None, "x"), ["m"])) == ["m+memo"]
    with pytest.raises(ConfigError, match=r"memo\.name: 'm\+memo' is a model of this server already"):
        chat_models(config, ChatHost(None, "x"), ["m", "m+memo"])


@pytest.mark.parametrize("leaves", [False, True])
def test_an_answer_ends_when_its_client_leaves(leaves):
    ended = []

    async def run():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer():
            try:
                await asyncio.sleep(5 if leaves else 0.05)
                return 200, {}
            finally:
                ended.append(True)

        asyncio.get_running_loop().call_later(0.02 if leaves else 30, gone.set)
        return await until_gone(answer(), receive)

    status, _ = asyncio.run(run())
    assert (status, ended) == (499 if leaves else 200, [True])


def test_an_answer_that_fails_is_the_server_s_to_report():
    async def answer():
        raise KeyError("x")

    async def receive():
        await asyncio.sleep(30)

    with pytest.raises(KeyError):
        asyncio.run(until_gone(answer(), receive))
