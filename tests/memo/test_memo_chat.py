"""Both models under one name: chat requests in, chat completions out, whatever engine serves them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import pytest

from benchmarks.memo.scripted import Scripted
from benchmarks.memo.world import World
from mem_triton.config import ConfigError, parse_config
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, ChatHost
from mem_triton.systems.memo.chat import MemoChat, ServedModel
from mem_triton.systems.memo.endpoint import CallError
from mem_triton.systems.memo.section import MemoSection
from mem_triton.systems.memo.system import SYSTEM
from mem_triton.systems.request import RequestError

WORLD = World()
TWO_HOP = list(WORLD.two_hop())
NAMES = {"memory": "memory", "executive": "executive", "name": "M+memo", "backoff": 0.01}


class Served:
    """The scripted models as a server's own: asked without HTTP. status: of memory's answers; delay: of each."""

    def __init__(self, status=200, delay=0.0):
        self.scripted, self.status, self.delay = Scripted(WORLD), status, delay
        self.bodies, self.running, self.cancelled, self.closed = [], 0, 0, 0

    async def __call__(self, body, caller):
        self.bodies.append(body)
        self.running += 1
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            await asyncio.sleep(0.05)  # as a connection closes
            self.closed += 1
            raise
        finally:
            self.running -= 1
        if self.status != 200 and body["model"] == "memory":
            return self.status, {"error": {"message": "told to fail"}}
        message = {"role": "assistant", "content": self.scripted.complete(body)}
        tokens = {"prompt_tokens": 10, "completion_tokens": 5}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": tokens}


def body(question=TWO_HOP[0].question, **more):
    return {"model": "M+memo", "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def served_chat(served=None, fields_in="vllm_xargs", **section):
    return MemoChat(MemoSection(**{**NAMES, **section}), ChatHost(served or Served(), fields_in))


def answered(chat, said):
    async def ask():
        try:
            return await chat.answer(said)
        finally:
            await chat.close()

    return asyncio.run(ask())


def streamed(chat, said):
    async def ask():
        try:
            return [event async for event in chat.stream(said)]
        finally:
            await chat.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("schema", ["paper", "compact"])
def test_an_answer_is_a_chat_completion_whose_usage_sums_every_call(schema):
    served = Served()
    status, said = answered(served_chat(served, executive_schema=schema), body())
    (choice,) = said["choices"]
    assert status == 200 and said["object"] == "chat.completion" and said["model"] == "M+memo"
    assert choice["message"]["content"] == TWO_HOP[0].value and choice["finish_reason"] == "stop"
    assert f"works for {TWO_HOP[0].via}" in choice["message"]["reasoning_content"]
    calls = len(served.bodies)
    assert said["usage"] == {"prompt_tokens": 10 * calls, "completion_tokens": 5 * calls, "total_tokens": 15 * calls}
    assert "mem_triton" not in said


def test_the_trace_comes_when_it_is_asked_for():
    _, said = answered(served_chat(), body(vllm_xargs={"mem_memo_trace": 1}))
    assert [item["used"] for item in said["mem_triton"]["memo"]["replies"]] == [True, False, True]
    parts = [json.loads(event[6:]) for event in streamed(served_chat(), body(vllm_xargs={"mem_memo_trace": 1}))[:-1]]
    assert "memo" in parts[-1]["mem_triton"] and parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_gives_progress_then_the_answer():
    events = streamed(served_chat(), body(stream=True, stream_options={"include_usage": True}))
    assert events[-1] == "data: [DONE]\n\n"
    parts = [json.loads(event[6:]) for event in events[:-1]]
    deltas = [part["choices"][0]["delta"] for part in parts if part["choices"]]
    kinds = [next(iter(delta), "end") for delta in deltas]
    assert kinds == ["role", *["reasoning_content"] * 3, "content", "end"]
    assert "".join(delta.get("content", "") for delta in deltas) == TWO_HOP[0].value
    whole = answered(served_chat(), body())[1]
    assert (
        "".join(delta.get("reasoning_content", "") for delta in deltas)
        == whole["choices"][0]["message"]["reasoning_content"]
    )
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []


def test_an_outage_is_502_with_its_reason_and_a_stream_says_it_too():
    status, said = answered(served_chat(Served(status=500)), body())
    assert status == 502 and "told to fail" in said["error"]["message"] and said["error"]["code"] == 502
    last = json.loads(streamed(served_chat(Served(status=500)), body())[-1][6:])
    assert last["error"] == said["error"]


def test_a_server_elsewhere_is_asked_over_http(server):
    chat = served_chat(memory=server.spec("memory"), executive=server.spec("executive"))
    assert answered(chat, body())[1]["choices"][0]["message"]["content"] == TWO_HOP[0].value
    status, said = answered(served_chat(memory=server.spec("nobody")), body())
    assert status == 502 and "has no model 'nobody'" in said["error"]["message"]
    last = json.loads(streamed(served_chat(memory="http://127.0.0.1:9/v1#m"), body())[-1][6:])
    assert "cannot be reached" in last["error"]["message"]


def test_memory_fields_go_to_the_executive_alone():
    served = Served()
    answered(served_chat(served), body(vllm_xargs={"mem_session": "alice", "mem_memo_trace": 1}))
    fields = {said["model"]: said.get("vllm_xargs") for said in served.bodies}
    assert fields == {"executive": {"mem_session": "alice"}, "memory": None}


REFUSED = {
    "n": 2,
    "logprobs": True,
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "stop": ["x"],
    "response_format": {"type": "json_object"},
    "logit_bias": {"1": 2},
    "max_tokens": 8,
    "messages": [],
    "top_p": 0.5,
    "regex": "a+",
    "lora_path": "other",
    "guided_json": {"type": "object"},
    "vllm_xargs": ["mem_memo_trace"],
}

AS_LEFT_OUT = {
    "n": 1,
    "logprobs": False,
    "tools": [],
    "tool_choice": "none",
    "top_p": 1.0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "user": "ada",
    "store": True,
    "logit_bias": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_before_anything_is_asked(name):
    served = Served()
    with pytest.raises(RequestError) as error:
        served_chat(served).check(body(**{name: REFUSED[name]}))
    assert error.value.field == name and served.bodies == []


@pytest.mark.parametrize("fields_in", ["vllm_xargs", "custom_params"])
def test_what_is_as_if_it_were_left_out_is_no_reason_to_refuse(fields_in):
    served_chat(fields_in=fields_in).check(body(**AS_LEFT_OUT, **{fields_in: {"mem_memo_trace": 1}}))


def test_messages_that_are_no_question_are_refused():
    chat = served_chat()
    image = [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    for messages in (
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": image}],
        [{"role": "user", "content": "x" * 9000}],
    ):
        with pytest.raises(RequestError):
            chat.check(body(messages=messages))
    for fields in ({"mem_memo_trace": 3}, {"mem_session": "a"}):
        with pytest.raises(RequestError, match=next(iter(fields))):
            served_chat(executive="http://localhost:1/v1#m").check(body(vllm_xargs=fields))


def test_what_was_said_before_is_part_of_the_question():
    served = Served()
    before = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello Ada."}]
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "am I?"}]
    answered(served_chat(served), body(messages=[*before, {"role": "user", "content": parts}]))
    assert "Who\\nam I?\\n\\n(Said before:\\nuser: My name is Ada." in served.bodies[0]["messages"][1]["content"]


def test_a_full_queue_is_429_and_those_who_wait_are_served():
    served = Served(delay=0.05)
    chat = served_chat(served, at_once=1, waiting=2)

    async def ask():
        return await asyncio.gather(*(chat.answer(body()) for _ in range(5)))

    assert sorted(status for status, _ in asyncio.run(ask())) == [200, 200, 200, 429, 429]
    assert served.running == 0 and chat._inside == 0
    assert answered(chat, body())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_cancels_what_is_asked(stream):
    """At once, and its place in the queue is free again."""
    served = Served(delay=30)
    chat = served_chat(served, at_once=1, waiting=0)

    async def leave():
        if stream:
            events = chat.stream(body())
            await anext(events)
            reading = asyncio.create_task(anext(events))
        else:
            reading = asyncio.create_task(chat.answer(body()))
        while not served.running:
            await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if stream:
            await events.aclose()
        return served.running

    began = time.monotonic()
    assert asyncio.run(leave()) == 0 and served.cancelled == 1 and time.monotonic() - began < 5
    assert chat._inside == 0


def test_whoever_is_cancelled_twice_lets_what_was_asked_close():
    """As servers do with a stream whose client has left: a second cancellation must not reach the closing."""
    served = Served(delay=30)
    chat = served_chat(served, at_once=1, waiting=0)

    async def read():
        async with contextlib.aclosing(chat.stream(body())) as events:
            async for _ in events:
                pass

    async def leave():
        reading = asyncio.create_task(read())
        while not served.running:
            await asyncio.sleep(0.01)
        for _ in range(3):
            reading.cancel()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        return served.running

    assert asyncio.run(leave()) == 0 and (served.cancelled, served.closed) == (1, 1) and chat._inside == 0


def test_an_engine_without_chat_models_refuses_the_section_by_name():
    config = parse_config({"memo": NAMES})
    assert config.systems == ("memo",) and config.memo.budget.pinning_turns == 7
    with pytest.raises(ConfigError, match=r"mem_triton\.memo: transformers lacks what MeMo needs: a protocol above"):
        registry.check_capabilities(config.systems, {Capability.SEGMENTS}, "transformers")
    registry.check_capabilities(config.systems, {Capability.CHAT}, "vLLM")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "x"}, r"mem_triton\.memo\.memory: Field required"),
        ({**NAMES, "dialekt": "plain"}, r'memo\.dialekt: unknown key\. Did you mean "dialect"'),
        ({**NAMES, "budget": {"turns": 1}}, r"memo\.budget\.turns: unknown key"),
        ({**NAMES, "budget": {"completion_tokens": 5}}, r"leaves no room for the last answer"),
    ],
)
def test_a_bad_section_is_named(section, said):
    with pytest.raises(ConfigError, match=said):
        parse_config({"memo": section})


def test_the_field_is_refused_in_requests_to_the_engine_itself():
    part = SYSTEM.frontend(parse_config({"memo": NAMES}), None, None)
    assert part.admit(SYSTEM.parse({}, ""), None) is None
    with pytest.raises(RequestError, match=r"mem_memo_trace: belongs to chat requests to the model 'M\+memo'"):
        part.admit(SYSTEM.parse({"mem_memo_trace": 1}, ""), None)


class Swallows(Served):
    """As vLLM: a call that is cancelled is answered, as if its client had left."""

    async def __call__(self, body, caller):
        try:
            return await super().__call__(body, caller)
        except asyncio.CancelledError:
            return 400, {"error": {"message": "Client disconnected"}}


def swallowing(delay):
    model = ServedModel("memory", ChatHost(Swallows(delay=delay), "vllm_xargs"), {}, None)
    return lambda seconds: model.chat([{"role": "user", "content": "Who?"}], seconds=seconds, max_tokens=8)


def test_a_call_that_takes_too_long_is_a_timeout_also_where_the_engine_answers_it():
    with pytest.raises(CallError, match=r"no answer within 0\.1 seconds"):
        asyncio.run(swallowing(30)(0.1))


def test_whoever_is_cancelled_is_gone_also_where_the_engine_answers_a_cancelled_call():
    async def leave():
        asking = asyncio.create_task(swallowing(30)(20))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait({asking})
        return asking.cancelled()

    assert asyncio.run(leave())
