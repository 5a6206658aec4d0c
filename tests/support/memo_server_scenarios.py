"""What every engine's HTTP server must do with a chat model of MeMo: tests that each engine's file imports.

The engine's file has the fixture ``start``, a function of a configuration and a log: it starts a server with the
adapter "memo".
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.memo.world import World
from mem_triton.systems.memo.trace import read
from tests.support.bench import Bench
from tests.support.memo import ScriptedServer
from tests.support.server import ServerProcess, until

CHAT = "/v1/chat/completions"
QUESTION = "Who owns the red kite?"
TOKENS = 16
"""Tokens of a reply of the memory model."""

Start = Callable[[dict[str, Any], str], ServerProcess]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    yield server
    server.stop()


@pytest.fixture
def executive(scripted: ScriptedServer) -> ScriptedServer:
    scripted.reset()
    return scripted


@pytest.fixture(scope="module")
def server(
    lora_bench: Bench, scripted: ScriptedServer, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A model with δ-mem and an adapter; the executive is elsewhere."""
    memory = {**lora_bench.memory, "memo": section(scripted.spec("executive"))}
    server = start(memory, str(tmp_path_factory.mktemp("server") / "log"))
    try:
        yield ready(server)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def stock(lora_bench: Bench, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same without MeMo and without its routes."""
    server = start(lora_bench.memory, str(tmp_path_factory.mktemp("stock") / "log"))
    try:
        yield server.wait()
    finally:
        server.stop()


def section(executive: str) -> dict[str, Any]:
    """The configuration of a server."""
    return {
        "memory": "memo",
        "executive": executive,
        "name": "m+memo",
        "executive_schema": "compact",
        "memory_tokens": TOKENS,
        "at_once": 1,
        "waiting": 0,
    }


def decision(kind: str, text: str) -> str:
    return "text:" + json.dumps({"decision": kind, "text": text})


def asks(executive: ScriptedServer, *questions: str, answer: str = "Mara Stone") -> None:
    """Let the executive ask these questions, and answer then."""
    for question in questions:
        executive.fault("executive", decision("ask", question))
    executive.fault("executive", decision("answer", answer), times=50)


def ready(server: ServerProcess) -> ServerProcess:
    """The server after its first request, which sees whether the executive's server takes schemas."""
    chat(server.wait())
    return server


def chat(server: ServerProcess, question: str = QUESTION, **more: Any) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    return server.http.post(CHAT, json={"model": "m+memo", "messages": messages, **more})


def trace_of(server: ServerProcess, **more: Any) -> dict[str, Any]:
    answer = chat(server, **{server.fields_in: {"mem_memo_trace": 1}}, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(response: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def test_d1_both_models_are_one_name_and_the_memory_model_is_an_adapter_of_this_server(
    server: ServerProcess, executive: ScriptedServer, lora_bench: Bench
) -> None:
    """The memory model is a LoRA of this server; its replies are those of the merged model (D1)."""
    questions = "Who has a kite?", "What is red?"
    asks(executive, *questions)
    before = server.metric(server.requests_done)
    said = trace_of(server, temperature=0)
    assert said["choices"][0]["message"]["content"] == "Mara Stone" and said["model"] == "m+memo"
    trace = said["mem_triton"]["memo"]
    memory = [call for call in trace["calls"] if call["to"] == "memory"]
    assert [call["messages"][0]["content"] for call in memory] == list(questions)
    assert all(call["outcome"] == "replied" and call["completion_tokens"] > 0 for call in memory)
    assert server.metric(server.requests_done) == before + 2  # the engine's own counters
    asked = trace["calls"][0]["messages"], trace["calls"][-1]["messages"]
    assert "Known: nothing yet" in asked[0][1]["content"] and "Known: nothing yet" not in asked[1][1]["content"]
    assert said["usage"]["total_tokens"] == trace["spent"]["prompt_tokens"] + trace["spent"]["completion_tokens"]
    for question, call in zip(questions, memory, strict=True):
        assert call["text"] == merged_text(server, lora_bench, question)
        assert call["text"] != server.chat(question, TOKENS).json()["choices"][0]["message"]["content"]


def merged_text(server: ServerProcess, lora_bench: Bench, question: str) -> str:
    """What the model with the adapter in its weights says, by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lora_bench.model)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return tokenizer.decode(lora_bench.fresh(list(prompt), TOKENS), skip_special_tokens=True)


def test_it_is_listed_and_the_server_s_models_too(server: ServerProcess, stock: ServerProcess) -> None:
    """Behind the server's own models."""
    names_are(server, "m", "memo", "m+memo")
    names_are(stock, "m", "memo")


def names_are(server: ServerProcess, *names: str) -> None:
    """These models are listed, in this order."""
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == list(names)


def test_the_base_never_answers_under_the_name_by_which_an_adapter_is_listed(server: Any, lora_bench: Bench) -> None:
    """The adapter answers, or the route refuses the name."""
    for stream in (False, True):
        answer = server.chat(QUESTION, TOKENS, model="memo", stream=stream)
        assert answer.status_code == 200, answer.text
        choices = [choice for one in (events(answer) if stream else [answer.json()]) for choice in one["choices"]]
        said = "".join((choice.get("delta") or choice.get("message") or {}).get("content") or "" for choice in choices)
        assert said == merged_text(server, lora_bench, QUESTION)
    answer = server.complete(QUESTION, TOKENS, model="memo")
    adapted = server.complete(QUESTION, TOKENS, model=server.adapted("memo")).json()["choices"][0]["text"]
    assert adapted != server.complete(QUESTION, TOKENS).json()["choices"][0]["text"]
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["text"] == adapted
    else:
        assert answer.status_code == 400 and "'m:memo'" in answer.text, answer.text


def test_a_stream_gives_progress_then_the_answer(server: ServerProcess, executive: ScriptedServer) -> None:
    """As server-sent events."""
    asks(executive, "Who has a kite?")
    answer = chat(server, stream=True, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in events(answer) if event["choices"]]
    assert answer.text.endswith("data: [DONE]\n\n") and answer.headers["content-type"].startswith("text/event-stream")
    assert "Who has a kite?" in deltas[1]["reasoning_content"] and deltas[2] == {"content": "Mara Stone"}
    assert events(answer)[-1]["usage"]["total_tokens"] > 0


def plain(said: Any) -> Any:
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
        texts = [{name for name, value in one.get("delta", {}).items() if value} for one in (choice, last)]
        if texts == [{"content"}, {"content"}] and before.keys() == part.keys():
            assert last["finish_reason"] is None
            choice["delta"]["content"] = last["delta"]["content"] + choice["delta"]["content"]
            found.pop()
        found.append(part)
    return found


OTHERS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2},
    "stream": {"temperature": 0, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}},
    "session": {"temperature": 0, "max_tokens": 12, "fields": {"mem_session": "alice"}},
    "several": {"temperature": 0, "max_tokens": 6, "n": 2},
    "bad field": {"temperature": -3},
    "misspelt field": {"fields": {"mem_sesion": "alice"}},
}
SERVED = ("plain", "stream", "session")
"""Those that both engines answer; vLLM refuses several greedy answers."""


@pytest.mark.parametrize("name", OTHERS)
def test_answers_of_the_server_s_own_models_are_as_they_were(
    server: ServerProcess, stock: ServerProcess, name: str
) -> None:
    """Streams, too, and what is refused."""
    found = []
    for one in (server, stock):
        messages = [{"role": "user", "content": "The key of the east door"}]
        body = {"model": "m", "messages": messages, **OTHERS[name]}
        if (fields := body.pop("fields", None)) is not None:
            body[one.fields_in] = fields
        answer = one.http.post(CHAT, json=body)
        said = joined(events(answer)) if body.get("stream") else answer.json()
        found.append((answer.status_code, answer.headers["content-type"], plain(said)))
    assert found[0] == found[1] and (found[0][0] == 200 or name not in SERVED), found[0]


REFUSED: dict[str, Any] = {
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "stop": ["x"],
    "top_p": 0.5,
}


def test_what_cannot_be_served_is_400_by_name(server: ServerProcess, executive: ScriptedServer) -> None:
    """Before anything is asked."""
    for field, value in REFUSED.items():
        answer = chat(server, **{field: value})
        assert answer.status_code == 400 and field in answer.json()["error"]["message"], answer.text
    assert executive.seen()["requests"] == []


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/embeddings": {"input": "x"},
    "/v1/classify": {"input": "x"},
    "/v1/score": {"query": "x", "items": ["y"]},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def test_other_routes_refuse_the_name(server: ServerProcess) -> None:
    """Whether the server has them or not; the base model never answers in its place."""
    for path, body in ROUTES.items():
        answer = server.http.post(path, json={"model": "m+memo", **body})
        assert answer.status_code == 400 and "m+memo" in answer.text and CHAT in answer.text, (path, answer.text)
    answer = server.http.post("/tokenize", json={"model": "m", "prompt": "m+memo"})
    assert answer.status_code == 200, answer.text
    card = server.http.get("/v1/models").json()["data"][-1]
    assert (card["id"], card["owned_by"]) == ("m+memo", "mem_triton")


def test_the_trace_s_field_is_for_that_model_alone(server: ServerProcess) -> None:
    """HTTP 400 that says so."""
    answer = server.chat("x", fields={"mem_memo_trace": 1})
    assert answer.status_code == 400 and "m+memo" in answer.text


def test_an_executive_that_is_down_is_502_with_the_reason(server: ServerProcess, executive: ScriptedServer) -> None:
    """With its reason."""
    executive.fault("executive", "400", times=50)
    answer = chat(server)
    assert answer.status_code == 502 and "HTTP 400" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_calls_and_a_full_queue_is_429(
    server: ServerProcess, executive: ScriptedServer, stream: bool
) -> None:
    """Within a second; while it is there a full queue is 429."""
    executive.fault("executive", "hang", times=1)
    with (
        pytest.raises(httpx.TimeoutException),
        server.http.stream(
            "POST",
            CHAT,
            timeout=1.0,
            json={"model": "m+memo", "messages": [{"role": "user", "content": QUESTION}], "stream": stream},
        ) as response,
    ):
        full = chat(server)
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        for _ in response.iter_lines():
            pass
    until(lambda: executive.seen()["now"] == 0, "the call to the executive is cancelled", 20)  # else after a minute
    executive.reset()
    asks(executive, "Who has a kite?")
    assert chat(server).status_code == 200


def test_a_world_is_answered_through_the_server(server: ServerProcess) -> None:
    """A two-hop question whose memory model knows nothing, for it is a random one: no answer from thin air."""
    asked = next(iter(World().two_hop()))
    said = chat(server, asked.question, temperature=0).json()
    assert said["choices"][0]["message"]["content"] != asked.value


def test_d2_a_trace_replays(server: ServerProcess, executive: ScriptedServer, tmp_path: Path) -> None:
    """D2: to the same bytes, and a second run without sampling is the same but for its times."""
    traces = []
    for number in range(2):
        executive.reset()
        asks(executive, "Who has a kite?", "What is red?")
        document = trace_of(server, temperature=0)["mem_triton"]["memo"]
        path = tmp_path / f"{number}.json"
        path.write_bytes(json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n")
        traces.append(read(path).without_times())  # refuses what does not replay
    assert traces[0] == traces[1]


def test_d3_budgets_hold(server: ServerProcess, executive: ScriptedServer) -> None:
    """D3: an executive that asks on and on has its eight turns, and then has to answer."""
    asks(executive, *(f"Who has kite {number}?" for number in range(8)))
    counted = server.metric("mem_triton:memo_budgets_total")
    said = trace_of(server)
    trace = said["mem_triton"]["memo"]
    assert said["choices"][0]["message"]["content"] == "Mara Stone" and "seeking_turns" in trace["result"]["ended_by"]
    assert (trace["spent"]["executive_calls"], trace["spent"]["memory_calls"]) == (9, 8)
    assert server.metric("mem_triton:memo_budgets_total") == counted + 1


def test_d4_malformed_json_ends_no_run(server: ServerProcess, executive: ScriptedServer) -> None:
    """D4: it is asked for again, or costs a turn."""
    for kind in ("broken_json", "refusal", "empty", "garbage"):
        executive.reset()
        executive.fault("executive", kind)
        asks(executive, "Who has a kite?")
        answer = chat(server)
        assert answer.status_code == 200, (kind, answer.text)
        assert answer.json()["choices"][0]["message"]["content"] == "Mara Stone"


@contextlib.contextmanager
def asked(server: ServerProcess, path: str, **body: Any) -> Iterator[None]:
    """A request whose answer nobody reads; its client leaves at the end."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    address = server.http.base_url.host, server.http.base_url.port
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + data)
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(server: Any, executive: ScriptedServer, stream: bool) -> None:
    """The memory model's request leaves the engine's queue within a second; those of others stay."""
    asks(executive, "Who has a kite?")
    long = {"model": "m", "prompt": "x", "max_tokens": 3000, "ignore_eos": True}
    with contextlib.ExitStack() as crowd:
        for _ in range(8):
            crowd.enter_context(asked(server, "/v1/completions", **long))
        until(lambda: server.inside() == 8, "a crowd is in the engine")
        messages = [{"role": "user", "content": QUESTION}]
        with asked(server, CHAT, model="m+memo", messages=messages, stream=stream):
            until(lambda: server.inside() == 9, "the call to the memory model is in the engine")
        left = time.monotonic()
        until(lambda: server.inside() == 8, "the call leaves with its client", 20)
        print(f"the call left the engine {time.monotonic() - left:.2f} s after its client")
    until(lambda: server.inside() == 0, "the crowd leaves", 60)


def test_an_adapter_is_replaced_while_it_serves(
    server: Any, executive: ScriptedServer, lora_bench: Bench, tmp_path: Path
) -> None:
    """What was cached under the old one is not read under the new one."""
    other = adapter_of_nothing(tmp_path / "other", lora_bench.lora)
    questions = []
    for adapter in (lora_bench.lora, other, lora_bench.lora):
        server.load_adapter("memo", adapter)
        executive.reset()
        asks(executive, "Who has a kite?")
        calls = trace_of(server, temperature=0)["mem_triton"]["memo"]["calls"]
        questions.append(next(call["text"] for call in calls if call["to"] == "memory"))
    assert questions[0] == questions[2] == merged_text(server, lora_bench, "Who has a kite?") != questions[1]
    plain = server.chat("Who has a kite?", TOKENS).json()["choices"][0]["message"]["content"]
    assert questions[1] == plain  # the other one adds nothing


LONG = 600
"""Tokens of an answer that an adapter is replaced under."""


def replaced_in_flight(server: Any, lora: Path, other: Path) -> tuple[str, str, str]:
    """Replace the adapter, which is loaded, under a request that it answers. Ends with the first adapter.

    Returns what the request says undisturbed, what it says disturbed, and what the new adapter says.
    """
    undisturbed = long_answer(server)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(long_answer, server)
        until(lambda: server.inside() == 1, "the request is in the engine")
        replaced = pool.submit(server.load_adapter, "memo", other)
        time.sleep(0.05)
        assert not asked.done(), "the answer is too short for this test"
        replaced.result()
        found = undisturbed, asked.result(), long_answer(server)
    server.load_adapter("memo", lora)
    return found


def long_answer(server: Any) -> str:
    """What the adapter says; the penalty keeps it out of loops, from which no other weights would bring it."""
    more = {"ignore_eos": True, "frequency_penalty": 1.0}
    answer = server.chat("Who has a kite?", LONG, model=server.adapted("memo"), **more)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_request_in_flight_keeps_its_adapter(server: Any, lora_bench: Bench, tmp_path: Path) -> None:
    """The new one is loaded when it has ended."""
    other = scaled(tmp_path / "other", lora_bench.lora, 4.0)
    undisturbed, disturbed, new = replaced_in_flight(server, lora_bench.lora, other)
    assert disturbed == undisturbed != new


def adapter_of_nothing(folder: Path, lora: Path) -> Path:
    """The same adapter with zeros."""
    return scaled(folder, lora, 0.0)


def scaled(folder: Path, lora: Path, factor: float) -> Path:
    """The same adapter with all its factors multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(lora, folder, dirs_exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file({name: factor * value for name, value in load_file(weights).items()}, weights)
    return folder
