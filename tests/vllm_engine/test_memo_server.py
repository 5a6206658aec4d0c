"""MeMo on a real ``vllm serve``: one name for both models beside the server's own, which answer as they did."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.memo.world import World
from tests.support.memo import ScriptedServer
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine

QUESTION = "Who owns the red kite?"
MEMO = {"memory": "m", "name": "m+memo", "executive_schema": "compact", "memory_tokens": 16, "at_once": 1, "waiting": 0}


def decision(kind: str, text: str) -> str:
    return "text:" + json.dumps({"decision": kind, "text": text})


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    yield server
    server.stop()


@pytest.fixture
def executive(scripted):
    scripted.reset()
    return scripted


@pytest.fixture(scope="module")
def server(bench, scripted, tmp_path_factory) -> Iterator[Server]:
    """A model with δ-mem that is also the memory model; the executive is elsewhere."""
    flags = memory_flags({**bench.memory, "memo": {**MEMO, "executive": scripted.spec("executive")}})
    log = str(tmp_path_factory.mktemp("server") / "log")
    server = Server(str(bench.model), log, flags, VLLM_PLUGINS="mem_triton")
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def stock(bench, tmp_path_factory) -> Iterator[Server]:
    """The same without MeMo and without the plugin's routes."""
    server = Server(str(bench.model), str(tmp_path_factory.mktemp("stock") / "log"), memory_flags(bench.memory))
    try:
        yield server.wait()
    finally:
        server.stop()


def chat(server: Server, question: str = QUESTION, **more) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    return server.http.post("/v1/chat/completions", json={"model": "m+memo", "messages": messages, **more})


def asks(executive: ScriptedServer, *questions: str, answer: str = "Mara Stone") -> None:
    for question in questions:
        executive.fault("executive", decision("ask", question))
    executive.fault("executive", decision("answer", answer), times=50)


def test_both_models_are_one_name_and_the_memory_model_is_asked_in_this_server(server, executive):
    chat(server)  # the first request sees whether the executive's server takes schemas
    executive.reset()
    asks(executive, "Who has a kite?", "What is red?")
    before = server.metric("vllm:request_success_total")
    answer = chat(server, vllm_xargs={"mem_memo_trace": 1})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["choices"][0]["message"]["content"] == "Mara Stone" and said["model"] == "m+memo"
    trace = said["mem_triton"]["memo"]
    memory = [call for call in trace["calls"] if call["to"] == "memory"]
    assert [call["messages"][0]["content"] for call in memory] == ["Who has a kite?", "What is red?"]
    assert all(call["outcome"] == "replied" and call["completion_tokens"] > 0 for call in memory)
    assert server.metric("vllm:request_success_total") == before + 2  # the engine's own counters
    asked = trace["calls"][0]["messages"], trace["calls"][-1]["messages"]
    assert "Known: nothing yet" in asked[0][1]["content"] and "Known: nothing yet" not in asked[1][1]["content"]
    assert said["usage"]["total_tokens"] == trace["spent"]["prompt_tokens"] + trace["spent"]["completion_tokens"]


def test_it_is_listed_and_the_server_s_models_too(server, stock):
    listed = [[model["id"] for model in s.http.get("/v1/models").json()["data"]] for s in (server, stock)]
    assert listed == [["m", "m+memo"], ["m"]]


def events(response: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def test_a_stream_gives_progress_then_the_answer(server, executive):
    asks(executive, "Who has a kite?")
    answer = chat(server, stream=True, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in events(answer) if event["choices"]]
    assert answer.text.endswith("data: [DONE]\n\n") and answer.headers["content-type"].startswith("text/event-stream")
    assert "Who has a kite?" in deltas[1]["reasoning_content"] and deltas[2] == {"content": "Mara Stone"}
    assert events(answer)[-1]["usage"]["total_tokens"] > 0


def plain(said):
    """A response without what differs from one request to the next, and without a digest of the configuration."""
    if isinstance(said, dict):
        omitted = ("id", "created", "system_fingerprint")
        return {name: plain(value) for name, value in said.items() if name not in omitted}
    return [plain(item) for item in said] if isinstance(said, list) else said


def joined(parts: list[dict]) -> list[dict]:
    """A stream's parts, with text that came in several made one: a busy server hands on several tokens at once."""
    found: list[dict] = []
    for part in parts:
        before, (choice, *_) = found[-1] if found else {}, part["choices"] or [{}]
        (last, *_) = before.get("choices") or [{}]
        if choice.get("delta", {}).keys() == last.get("delta", {}).keys() == {"content"}:
            assert last["finish_reason"] is None and before.keys() == part.keys()
            choice["delta"]["content"] = last["delta"]["content"] + choice["delta"]["content"]
            found.pop()
        found.append(part)
    return found


OTHERS = {
    "plain": {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2},
    "stream": {"temperature": 0, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}},
    "session": {"temperature": 0, "max_tokens": 12, "vllm_xargs": {"mem_session": "alice"}},
    "several": {"temperature": 0.7, "seed": 7, "max_tokens": 6, "n": 2},
    "bad field": {"temperature": -3},
    "misspelt field": {"vllm_xargs": {"mem_sesion": "alice"}},
    "other model": {"model": "nobody"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_answers_of_the_server_s_own_models_are_as_they_were(server, stock, name):
    """Streams, too, and what is refused."""
    found = []
    for one in (server, stock):
        messages = [{"role": "user", "content": "The key of the east door"}]
        answer = one.http.post("/v1/chat/completions", json={"model": "m", "messages": messages, **OTHERS[name]})
        said = joined(events(answer)) if OTHERS[name].get("stream") else answer.json()
        found.append((answer.status_code, answer.headers["content-type"], plain(said)))
    if name == "misspelt field":  # the hint names the nearest of the fields that there are, on both
        assert found[0][0] == 400
    assert found[0] == found[1] and (found[0][0] == 200) == (name in ("plain", "stream", "session", "several"))


def test_what_cannot_be_served_is_400_by_name(server, executive):
    for field, value in {
        "n": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "json_object"},
        "logprobs": True,
    }.items():
        answer = chat(server, **{field: value})
        assert answer.status_code == 400 and field in answer.json()["error"]["message"], answer.text
    assert executive.seen()["requests"] == []
    answer = server.http.post("/v1/completions", json={"model": "m+memo", "prompt": "x"})
    assert answer.status_code == 404 and "m+memo" in answer.text


def test_the_trace_s_field_is_for_that_model_alone(server):
    answer = server.chat("x", fields={"mem_memo_trace": 1})
    assert answer.status_code == 400 and "m+memo" in answer.text


def test_an_executive_that_is_down_is_502_with_the_reason(server, executive):
    executive.fault("executive", "400", times=50)
    answer = chat(server)
    assert answer.status_code == 502 and "HTTP 400" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_calls_and_a_full_queue_is_429(server, executive, stream):
    executive.fault("executive", "hang", times=1)
    with (
        pytest.raises(httpx.TimeoutException),
        server.http.stream(
            "POST",
            "/v1/chat/completions",
            timeout=1.0,
            json={"model": "m+memo", "messages": [{"role": "user", "content": QUESTION}], "stream": stream},
        ) as response,
    ):
        assert chat(server).status_code == 429
        for _ in response.iter_lines():
            pass
    if not stream:  # the response had not begun: nobody was inside of the block
        executive.reset()
    began = time.monotonic()
    while executive.seen()["now"]:
        assert time.monotonic() - began < 20  # a call that nobody cancels is given up after a minute
        time.sleep(0.05)
    executive.reset()
    asks(executive, "Who has a kite?")
    assert chat(server).status_code == 200


def test_a_world_is_answered_through_the_server(server, executive):
    """A two-hop question whose memory model knows nothing, for it is a random one: no answer from thin air."""
    asked = next(iter(World().two_hop()))
    said = chat(server, asked.question, temperature=0).json()
    assert said["choices"][0]["message"]["content"] != asked.value
