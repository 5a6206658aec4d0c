"""The model of both models when clients leave, servers fail or lie, and many ask at once."""

from __future__ import annotations

import asyncio
import gc
import json
import random

import pytest
from prometheus_client import REGISTRY

from mem_triton.systems.request import RequestError
from tests.memo.test_memo_chat import TWO_HOP, Served, answered, body, served_chat, streamed

ENDS = ("answer", "unknown", "error", "full", "left")


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"mem_triton:{name}", labels) or 0.0


def ended() -> dict[str, float]:
    return {end: counted("memo_answers_total", ended=end) for end in ENDS}


class Stepping(Served):
    """Answers after a few turns of the event loop, so that a client can leave between any two."""

    async def __call__(self, said, caller):
        self.running += 1
        try:
            await asyncio.sleep(0)
            self.delay = 0
            return await super().__call__(said, caller)
        finally:
            self.running -= 1


async def _steps(coroutine, most: int) -> bool:
    """Run for so many turns of the event loop, and leave; whether it had ended by itself."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(most):
        if task.done():
            break
        await asyncio.sleep(0)
    over = task.done()
    task.cancel()
    await asyncio.wait({task})
    return over


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_leave_at_every_await(stream):
    """Nothing of it stays: no call, no place, no task."""
    served = Stepping()
    chat = served_chat(served, at_once=1, waiting=0)

    async def read():
        async for _ in chat.stream(body(stream=True)):
            pass

    async def leave():
        turns = 0
        while not await _steps(read() if stream else chat.answer(body()), turns):
            for _ in range(3):
                await asyncio.sleep(0)
            await asyncio.sleep(0.06 if served.cancelled > served.closed else 0)
            assert chat._inside == 0 and served.running == 0 and not chat._free.locked()
            turns += 1
        assert len(asyncio.all_tasks()) == 1
        return turns

    before = ended()["left"]
    turns = asyncio.run(leave())
    assert turns > 20 and ended()["left"] > before + 10
    assert answered(chat, body())[0] == 200


KINDS = ["500", "429", "400", "broken_json", "refusal", "empty", "half", "garbage", "tools", "too_long", "long"]


def test_faults_of_every_kind_under_thirty_users(server):
    """Each is answered, or told what happened; some leave. Afterwards nothing runs."""
    chat = served_chat(
        memory=server.spec("memory"), executive=server.spec("executive"), at_once=16, waiting=64, call_seconds=5
    )
    chance = random.Random(7)

    async def one(number: int):
        asked = asyncio.ensure_future(chat.answer(body(TWO_HOP[number % len(TWO_HOP)].question)))
        if number % 5 == 4:
            await asyncio.sleep(0.1 + chance.random())
            asked.cancel()
        return (await asyncio.gather(asked, return_exceptions=True))[0]

    async def everybody():
        await chat.answer(body())  # sees whether the servers are there
        for _ in range(30):
            server.fault(chance.choice(["memory", "executive"]), chance.choice(KINDS), chance.randint(1, 2))
        try:
            return await asyncio.gather(*map(one, range(30)))
        finally:
            await chat.close()

    before = ended()
    found = asyncio.run(everybody())
    left = [one for one in found if isinstance(one, asyncio.CancelledError)]
    statuses = [one[0] for one in found if not isinstance(one, BaseException)]
    assert len(left) + len(statuses) == 30 and set(statuses) <= {200, 502, 504} and 200 in statuses
    assert all(one[1]["error"]["message"] for one in found if isinstance(one, tuple) and one[0] != 200)
    assert chat._inside == 0 and counted("memo_running") == 0
    assert sum(ended().values()) - sum(before.values()) == 31
    for _ in range(100):
        if server.seen()["now"] == 0:
            return
    raise AssertionError("calls of answers that are over still run")


def test_an_executive_that_never_ends_is_ended_by_its_budget():
    """It asks without end; the last answer rests on what is known. Without the budget it goes on far longer."""
    calls = {}
    for turns in (3, 60):
        served = Served()
        count = iter(range(10**6))
        served.scripted.models["executive"] = lambda said, asked, count=count: json.dumps(
            {"decision": "answer", "text": "Enough."}
            if "Give the answer now" in said[-1]["content"]
            else {"decision": "ask", "text": f"{TWO_HOP[next(count) % len(TWO_HOP)].question} ({next(count)})"}
        )
        chat = served_chat(served, executive_schema="compact", budget={"seeking_turns": turns, "executive_calls": 200})
        before = counted("memo_budgets_total", budget="seeking_turns")
        status, said = answered(chat, body(vllm_xargs={"mem_memo_trace": 1}))
        assert status == 200 and "seeking_turns" in said["mem_triton"]["memo"]["result"]["ended_by"]
        assert counted("memo_budgets_total", budget="seeking_turns") == before + 1
        calls[turns] = len(served.bodies)
    assert calls[3] < 12 < 60 < calls[60]


def test_an_endpoint_that_hangs_is_looked_at_once_for_all_who_wait(monkeypatch):
    """Not by one after the other; who leaves does not end the look of the others, and the next request looks again."""
    looks = []

    async def check(self, **options):
        looks.append(self.model)
        await asyncio.sleep(0.3)
        if len(looks) == 1:
            raise ValueError("hangs")

    monkeypatch.setattr("mem_triton.systems.memo.endpoint.Endpoint.check", check)
    chat = served_chat(executive="http://127.0.0.1:9/v1#m", at_once=16)

    async def ask():
        asked = [asyncio.ensure_future(chat.answer(body())) for _ in range(8)]
        await asyncio.sleep(0.1)
        asked[0].cancel()
        began = asyncio.get_running_loop().time()
        found = await asyncio.gather(*asked, return_exceptions=True)
        took = asyncio.get_running_loop().time() - began
        again = await chat.answer(body())
        await chat.close()
        return found, took, again

    found, took, again = asyncio.run(ask())
    assert isinstance(found[0], asyncio.CancelledError) and all(str(one) == "hangs" for one in found[1:])
    assert took < 2 and looks == ["m", "m"] and again[0] == 502


def test_halves_of_surrogate_pairs_break_no_answer(server):
    """JSON can say them, and UTF-8 cannot."""
    half = "\ud83d Mara"
    server.fault("executive", 'text:{"decision": "answer", "text": "\\ud83d Mara"}', times=50)
    chat = served_chat(memory=server.spec("memory"), executive=server.spec("executive"), executive_schema="compact")
    status, said = answered(chat, body(f"Who is {half}?", vllm_xargs={"mem_memo_trace": 1}))
    json.dumps(said, ensure_ascii=False).encode()
    assert status in (200, 502)


@pytest.mark.parametrize("name", ["seed", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", ["64", 64.5, True, [64]])
def test_numbers_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"{name}: must be a whole number"):
        served_chat().check(body(**{name: value}))


def test_a_full_queue_is_said_before_a_stream_begins():
    chat = served_chat(at_once=1, waiting=0)
    assert chat.busy() is None
    chat._inside = 1
    before = ended()["full"]
    assert "try again later" in chat.busy() and ended()["full"] == before + 1


def test_calls_are_counted_by_their_ends():
    before = [counted("memo_calls_total", to=to, outcome="replied") for to in ("executive", "memory")]
    failed = counted("memo_calls_total", to="memory", outcome="failed")
    seconds = counted("memo_seconds_count")
    served = Served()
    answered(served_chat(served), body())
    after = [counted("memo_calls_total", to=to, outcome="replied") for to in ("executive", "memory")]
    assert sum(after) - sum(before) == len(served.bodies)
    answered(served_chat(Served(status=500)), body())
    assert counted("memo_calls_total", to="memory", outcome="failed") > failed
    assert counted("memo_seconds_count") == seconds + 2


def test_many_answers_leave_nothing_in_the_process():
    chat = served_chat()

    async def ask(times: int) -> None:
        for _ in range(times):
            await chat.answer(body())
            streaming = [event async for event in chat.stream(body(stream=True))]
            assert streaming[-1] == "data: [DONE]\n\n"

    async def grown() -> int:
        await ask(5)
        chat.host.served.bodies.clear()
        gc.collect()
        before = len(gc.get_objects())
        await ask(30)
        chat.host.served.bodies.clear()
        gc.collect()
        return len(gc.get_objects()) - before

    assert asyncio.run(grown()) < 300  # a run's trace alone has more


def test_a_stream_and_a_whole_answer_count_alike():
    before = ended()["answer"]
    answered(served_chat(), body())
    streamed(served_chat(), body())
    assert ended()["answer"] == before + 2
