"""The protocol over real HTTP, against servers that know nothing of mem_triton and misbehave when told to."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from benchmarks.memo.world import World
from mem_triton.systems.memo import trace as traces
from mem_triton.systems.memo.driver import run
from mem_triton.systems.memo.endpoint import Endpoint, EndpointError
from mem_triton.systems.memo.protocol.settings import GREEDY, Budget, Settings
from mem_triton.systems.memo.trace import Trace, TraceError
from tests.support.memo import ScriptedServer

WORLD = World()
TWO_HOP = list(WORLD.two_hop())
GREEDILY = Settings(temperatures=GREEDY, backoff=0.01, call_seconds=5)


def ask(server, settings=GREEDILY, question=TWO_HOP[0].question, key=None, watch=lambda *step: None):
    """A run against a server's "executive" and "memory", with the checks that come before it."""

    async def asked() -> Trace:
        async with (
            Endpoint(server.spec("executive"), key=key) as executive,
            Endpoint(server.spec("memory"), key=key) as memory,
        ):
            await executive.check(structured=True)
            await memory.check()
            return await run(question, settings, {"executive": executive, "memory": memory}, watch)

    return asyncio.run(asked())


@pytest.mark.parametrize("dialect", ["plain", "paper"])
@pytest.mark.parametrize("schema", ["paper", "compact"])
def test_d2_two_runs_of_a_scripted_executive_are_the_same_to_the_byte(server, tmp_path, schema, dialect):
    settings = GREEDILY.model_copy(update={"executive_schema": schema, "dialect": dialect})
    for asked in TWO_HOP[:4]:
        first, second = (ask(server, settings, asked.question) for _ in range(2))
        assert first.result.kind == "answer" and first.result.text == asked.value
        assert first.without_times().to_bytes() == second.without_times().to_bytes()
        first.write(tmp_path / "trace.json")
        read = traces.read(tmp_path / "trace.json")
        assert read == first and read.to_bytes() == (tmp_path / "trace.json").read_bytes()


def test_d2_control_another_reply_is_another_trace(server):
    settings = GREEDILY.model_copy(update={"executive_schema": "compact"})
    first = ask(server, settings)
    server.fault("memory", "text:Cyra Kowal works for Zanvex.")
    assert ask(server, settings).without_times().to_bytes() != first.without_times().to_bytes()


def test_every_two_hop_question_and_no_stranger(server):
    right = sum(ask(server, question=asked.question).result.text == asked.value for asked in TWO_HOP[::4])
    assert right == len(TWO_HOP[::4])
    for asked in list(WORLD.unknown())[:5]:
        result = ask(server, question=asked.question).result
        assert result.kind == "unknown" and result.evidence == ()


def test_the_answer_says_what_it_rests_on(server):
    made = ask(server)
    told = made.document()
    used = [item for item in told["replies"] if item["used"]]
    assert [item["stage"] for item in used] == ["grounding", "seeking"] and TWO_HOP[0].value in used[1]["text"]
    calls = {call["id"]: call for call in told["calls"]}
    assert all(calls[id]["outcome"] == "replied" for item in used for id in item["calls"])
    assert all(len(call["prompt_sha256"]) == 64 and call["ms"] >= 0 for call in calls.values())


PASSING = ("429", "500", "503", "half", "garbage", "empty", "hang")
"""Faults of a call that the same call, repeated, does not have."""


@pytest.mark.parametrize("model", ["memory", "executive"])
@pytest.mark.parametrize("kind", PASSING)
def test_d3_a_fault_that_passes_is_repeated_and_counted(server, kind, model):
    before = ask(server).final.spent
    server.fault(model, kind, skip=0 if model == "memory" else 1)  # the executive's first request is the probe
    made = ask(server, GREEDILY.model_copy(update={"call_seconds": 0.5}))
    spent = made.final.spent
    assert made.result.text == TWO_HOP[0].value
    assert spent.executive_calls == before.executive_calls + (model == "executive")
    assert spent.memory_calls == before.memory_calls + (model == "memory")


@pytest.mark.parametrize("kind", [*PASSING, "400", "tools", "refusal", "too_long"])
def test_a_memory_model_that_is_down_is_an_error_and_never_an_answer(server, kind):
    server.fault("memory", kind, times=1000)
    made = ask(server, GREEDILY.model_copy(update={"call_seconds": 0.3, "retries": 1}))
    assert made.result.kind == "error" and made.result.status == 502 and "memory model answered" in made.result.text
    assert made.final.candidates.eliminated == () and {item.outcome for item in made.final.evidence} == {"failed"}


@pytest.mark.parametrize("kind", [*PASSING, "400", "tools", "too_long", "broken_json", "plain", "refusal", "long"])
def test_d4_an_executive_that_is_broken_for_good_crashes_nothing(server, kind):
    server.fault("executive", kind, times=1000, skip=1)
    made = ask(server, GREEDILY.model_copy(update={"call_seconds": 0.3, "retries": 1}))
    assert made.result.kind in ("error", "answer", "unknown") and made.result.text
    if kind not in ("plain", "refusal", "long"):  # words, which the last stage takes, and JSON with more behind it
        assert made.result.kind == "error" and made.result.status in (502, 504)


@pytest.mark.parametrize("kind", ["broken_json", "plain", "empty", "refusal", "tools"])
def test_d4_one_reply_that_cannot_be_read_costs_no_answer(server, kind):
    for skip in range(1, 6):
        server.reset()
        server.fault("executive", kind, skip=skip)
        assert ask(server).result.text == TWO_HOP[0].value, skip


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_server_that_will_never_answer_ends_the_run_at_once(server, status):
    server.fault("memory", status, times=1000)
    made = ask(server)
    assert made.result.kind == "error" and f"HTTP {status}" in made.result.text and made.final.spent.memory_calls <= 2


def test_a_server_that_dies_in_the_middle_is_an_error_and_the_trace_is_there(tmp_path):
    server = ScriptedServer(tmp_path)
    try:
        server.fault("memory", "die", skip=2)
        made = ask(server)
        assert made.result.kind == "error" and "the connection broke" in made.result.text
        assert [item.outcome for item in made.final.evidence[:2]] == ["answer", "answer"]
        made.write(tmp_path / "trace.json")
        assert traces.read(tmp_path / "trace.json").result == made.result
        with pytest.raises(EndpointError, match="cannot be reached"):
            ask(server)
    finally:
        server.stop()


def test_d3_time_ends_a_run_whose_memory_model_hangs(server):
    server.fault("memory", "hang", times=1000, skip=2)
    began = time.monotonic()
    made = ask(server, GREEDILY.model_copy(update={"budget": Budget(seconds=2), "call_seconds": 60, "retries": 0}))
    assert made.result.kind == "error" and "time ran out" in made.result.text and "seconds" in made.result.ended_by
    assert time.monotonic() - began < 20


def test_d6_questions_run_at_once(slow):
    """Two first questions take the time of one; and the server's most requests at once say so."""
    slow.reset()
    made = ask(slow, key="secret")
    assert made.result.text == TWO_HOP[0].value and slow.seen()["most_at_once"] == 2
    calls = [call for call in made.document()["calls"] if call["to"] == "memory" and call["stage"] == "grounding"]
    assert len({call["started_ms"] for call in calls}) == 1


def test_a_server_without_schemas_is_noticed_at_the_start_and_asked_in_words(slow, caplog):
    slow.reset()
    assert ask(slow, key="secret").result.text == TWO_HOP[0].value
    assert "does not follow JSON schemas" in caplog.text
    asked = [body for body in slow.seen()["requests"] if body["model"] == "executive"]
    assert ["response_format" in body for body in asked] == [True] + [False] * (len(asked) - 1)


def test_a_wrong_key_and_a_missing_model_are_named_before_anything_is_asked(slow, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match=r"API key is wrong or missing.*OPENAI_API_KEY"):
        ask(slow)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask(slow)

    async def check(spec: str) -> None:
        async with Endpoint(spec) as endpoint:
            await endpoint.check(structured=True)

    with pytest.raises(EndpointError, match="has no model 'other'; it has memory, executive"):
        asyncio.run(check(server.spec("other")))
    for spec in ("memory", "localhost:1/v1#m", "http://localhost:1/v1", "http://localhost:1/v1#", ""):
        with pytest.raises(EndpointError, match="URL#MODEL"):
            Endpoint(spec)


def test_whoever_leaves_cancels_every_call(server):
    """Both first questions hang, so that nothing but a broken connection ends them."""
    server.fault("memory", "hang", times=2)

    async def leave() -> None:
        async with Endpoint(server.spec("executive")) as executive, Endpoint(server.spec("memory")) as memory:
            models = {"executive": executive, "memory": memory}
            asked = asyncio.create_task(run(TWO_HOP[0].question, Settings(temperatures=GREEDY), models))
            while server.seen()["now"] < 2:
                await asyncio.sleep(0.02)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    asyncio.run(leave())
    began = time.monotonic()
    while server.seen()["now"]:
        assert time.monotonic() - began < 20
        time.sleep(0.02)
    assert server.seen()["left"] == 2


def test_an_endless_answer_is_cut_and_its_cost_counted(server):
    """The server generates 600,000 tokens where 256 were allowed: that is more than the whole run may cost."""
    server.fault("memory", "long", times=2)
    made = ask(server)
    assert made.result.kind == "error" and "servers count more tokens than were sent" in made.result.text
    assert made.result.ended_by == ("completion_tokens",) and {len(i.text) for i in made.final.evidence} == {2000}


def test_a_server_without_usage_is_counted_by_its_upper_bounds(server):
    plain = ask(server).final.spent
    server.fault("memory", "no_usage", times=1000)
    spent = ask(server).final.spent
    assert spent.memory_calls == plain.memory_calls and spent.prompt_tokens > plain.prompt_tokens
    assert spent.completion_tokens >= 3 * GREEDILY.memory_tokens


def test_a_reply_that_was_changed_in_a_trace_is_found(server, tmp_path):
    path = tmp_path / "trace.json"
    ask(server).write(path)
    told = json.loads(path.read_text())
    changes = {
        "version 9": {"version": 9},
        "not a trace": {"format": "x"},
        "damaged": {"events": [{"kind": "x"}]},
        "replay to another run": {"result": None},
        "damaged: ": {"question": ""},
    }
    for said, change in changes.items():
        path.write_text(json.dumps(told | change))
        with pytest.raises(TraceError, match=f"{path}.*{said}"):
            traces.read(path)
    for text in ("", "[]", "{" * 100_000, "\ud800".encode("utf-8", "surrogatepass"), b"\xff", "null"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(TraceError, match=str(path)):
            traces.read(path)
    told["events"][0]["text"] = 7
    path.write_text(json.dumps(told))
    with pytest.raises(TraceError, match="damaged"):
        traces.read(path)
    with pytest.raises(TraceError, match="No such file"):
        traces.read(tmp_path / "none.json")
