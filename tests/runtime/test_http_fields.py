"""Memory's fields are refused where an HTTP server would drop them; all else reaches the server as it was sent."""

from __future__ import annotations

import asyncio
import json

import pytest

from mem_triton.runtime.frontend.http_fields import FieldPlaces, RefuseMisplacedFields

PLACES = FieldPlaces(
    {"/v1/completions": "xargs", "/generate": "sampling_params.custom_params"},
    lambda body: "beam search" if body.get("beams") else None,
)


def post(path: str, body: bytes, size: int = 7, method: str = "POST", root: str = "") -> tuple[int, bytes]:
    """(status, body) of the answer; the server below answers 200 with what it read. size: bytes of a message."""
    sent, parts = [], [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)] + [
        {"type": "http.disconnect"}
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def server(scope, receive, send):
        read = b""
        while (message := await receive())["type"] == "http.request":
            read += message["body"]
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": read})

    scope = {"type": "http", "method": method, "path": root + path, "root_path": root}
    asyncio.run(RefuseMisplacedFields(server, PLACES)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "mem_ids and mem_session"}),
        ("/v1/completions", {"xargs": {"mem_ids": ["a"]}}),
        ("/v1/completions", {"metadata": {"mem_session": "a label of the client's own"}, "beams": 2}),
        ("/generate", {"sampling_params": [{"custom_params": {"mem_ids": []}}, {}]}),
        ("/v1/embeddings", {"input": ["mem_ids"]}),
        ("/v1/completions", ["mem_ids"]),
    ],
)
def test_fault06_requests_whose_words_are_heard_or_that_say_none_pass_as_they_are(path, body):
    raw = json.dumps(body).encode()
    assert post(path, raw) == (200, raw)
    assert post(path, raw, root="/proxy") == (200, raw)


@pytest.mark.parametrize("raw", [b"", b"{mem_ids", b'"mem_' + b"[" * 100_000, b"\xff mem_ids \xfe"])
def test_fault06_what_is_no_json_is_left_to_the_server(raw):
    assert post("/v1/completions", raw, size=4096) == (200, raw)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"mem_ids": ["a"]}, 'mem_ids: would be ignored here; it belongs into xargs: {"xargs": {'),
        ("/v1/completions/", {"mem_bogus": 1}, "mem_bogus: would be ignored here"),
        ("/v1/completions", {"custom_params": {"mem_ids": []}}, "belongs into xargs"),
        ("/v1/completions", {"extra_body": {"vllm_xargs": {"mem_top_k": 1}}}, "mem_top_k: would be ignored here"),
        ("/generate", {"custom_params": {"mem_ids": []}}, "belongs into sampling_params.custom_params"),
        ("/generate", {"sampling_params": {"mem_ids": []}}, "belongs into sampling_params.custom_params"),
        ("/generate", {"sampling_params": [{}, {"mem_ids": []}]}, "belongs into sampling_params.custom_params"),
        ("/api/generate", {"options": {"mem_ids": []}}, "/api/generate has no memory"),
        ("/v1/embeddings", {"xargs": {}, "mem_ids": []}, "/v1/embeddings has no memory"),
        ("/tokenize", {"vllm_xargs": {"mem_session": "s"}}, "/tokenize has no memory"),
        ("/v1/completions", {"beams": 2, "xargs": {"mem_bogus": 1}}, "mem_bogus: beam search cannot use memory"),
    ],
)
def test_fault06_words_that_a_server_would_drop_are_400_that_say_where_they_belong(path, body, message):
    for root in ("", "/proxy"):
        status, answer = post(path, json.dumps(body).encode(), root=root)
        said = json.loads(answer)["error"]
        assert status == 400 and message in said["message"] and said["message"].startswith(said["param"]), said
    assert post(path, json.dumps(body).encode(), method="GET")[0] == 200


def test_fault06_fields_of_a_form_are_words_too():
    form = b'--x\r\nContent-Disposition: form-data; name="mem_session"\r\n\r\nalice\r\n--x--'
    assert post("/v1/completions", form)[0] == 400
    text = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nmem_session\r\n--x--'
    assert post("/v1/completions", text) == (200, text)


def test_fault06_a_word_of_a_megabyte_is_not_repeated():
    status, answer = post("/v1/completions", json.dumps({"mem_" + "x" * 1_000_000: 1}).encode(), size=1 << 20)
    assert status == 400 and len(answer) < 2000
