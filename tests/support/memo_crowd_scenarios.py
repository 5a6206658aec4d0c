"""What a chat model of MeMo on a real engine must stand: many users, some of whom leave, while the executive's server
fails in every way that it can. Tests that each engine's file imports; see ``memo_server_scenarios``.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.bench import Bench
from tests.support.memo import ScriptedServer
from tests.support.memo_server_scenarios import CHAT, QUESTION, Start, asked, chat, events, ready, section
from tests.support.server import ServerProcess, at_once, until

FAULTS = (
    "400",
    "429",
    "500",
    "503",
    "broken_json",
    "refusal",
    "empty",
    "half",
    "garbage",
    "tools",
    "too_long",
    "plain",
)
ENDS = ("answer", "unknown", "error", "full", "left")
SECONDS = 240
"""Until a crowd counts as one that hangs."""


@dataclass(frozen=True)
class Heard:
    """What a user got: an answer, or an error and what it says. full: how often there was no place before.

    status: 0 of a user who left.
    """

    status: int
    text: str
    full: int = 0


def user(server: ServerProcess, number: int, seed: int) -> Heard:
    """One user of the crowd: every fifth leaves in the middle, every other one reads a stream."""
    chance, full = random.Random(seed + number), 0
    body = {"messages": [{"role": "user", "content": f"{QUESTION} ({number})"}], "stream": bool(number % 2)}
    if number % 5 == 4:
        with asked(server, CHAT, model="m+memo", **body):
            time.sleep(chance.uniform(0.05, 1.5))
        return Heard(0, "")
    if number % 6 == 5:  # one of the server's own models
        said = server.chat(QUESTION, 8, model=server.adapted("memo"))
        return Heard(said.status_code, said.text)
    while (heard := _heard(server, body)).status == 429:
        full += 1
        time.sleep(chance.uniform(0.05, 0.2))
    return Heard(heard.status, heard.text, full)


def _heard(server: ServerProcess, body: dict[str, Any]) -> Heard:
    answer = server.http.post(CHAT, json={"model": "m+memo", **body})
    if answer.status_code != 200:
        return Heard(answer.status_code, answer.json()["error"]["message"])
    if not body["stream"]:
        return Heard(200, answer.json()["choices"][0]["message"]["content"])
    parts = events(answer)
    if "error" in parts[-1]:
        return Heard(parts[-1]["error"]["code"], parts[-1]["error"]["message"])
    assert answer.text.endswith("data: [DONE]\n\n"), "a stream that ends tells how"
    return Heard(200, "".join(part["choices"][0]["delta"].get("content") or "" for part in parts))


def fail(scripted: ScriptedServer, model: str, chance: random.Random, count: int) -> None:
    """Let so many requests to a model fail, each kind of fault in its turn, with right answers in between."""
    kinds = list(FAULTS) * (count // len(FAULTS) + 1)
    for kind in chance.sample(kinds[:count], count):
        scripted.fault(model, kind, times=1, skip=chance.randint(0, 2))


def crowd(server: Any, scripted: ScriptedServer, users: int, seed: int = 7) -> list[Heard]:
    """Have so many users ask at once, and check what they heard and what is left of them."""
    before = {end: answers(server, end) for end in ENDS}
    calls, began = server.metric("mem_triton:memo_calls_total"), time.monotonic()
    heard = at_once(users, lambda number: user(server, number, seed))
    assert time.monotonic() - began < SECONDS, "nobody hangs"
    left = sum(one.status == 0 for one in heard)
    for one in heard:
        assert one.status in (0, 200, 502, 504), one
        assert one.status in (0, 200) or re.search("executive|memory", one.text), f"{one} does not say what happened"
        assert one.status == 0 or one.text
    assert left == len(range(4, users, 5))
    until(lambda: server.metric("mem_triton:memo_running") == 0, "no answer is worked on")
    until(lambda: server.inside() == 0, "no request is in the engine")
    until(lambda: is_idle(scripted), "no call is open", 60)
    ended = {end: answers(server, end) - before[end] for end in ENDS}
    own = sum(number % 6 == 5 and number % 5 != 4 for number in range(users))
    asked_us = [one for number, one in enumerate(heard) if one.status and number % 6 != 5]
    full, errors = sum(one.full for one in asked_us), sum(one.status != 200 for one in asked_us)
    assert len(asked_us) == users - left - own
    assert ended["full"] >= full and ended["error"] >= errors
    assert 0 <= sum(ended.values()) - len(asked_us) - full <= left, "each request is counted once, by its end"
    assert server.metric("mem_triton:memo_calls_total") > calls
    assert server.chat(QUESTION, 8).status_code == 200  # its step tells what is held
    until(lambda: server.held() == 0, "all blocks of the KV cache are free")
    return heard


def answers(server: ServerProcess, end: str) -> float:
    """Requests to the chat model that have ended so."""
    return server.metric(f'mem_triton:memo_answers_total{{ended="{end}"')


def is_idle(scripted: ScriptedServer) -> bool:
    """Whether it is up and answers nobody."""
    try:
        return scripted.seen()["now"] == 0
    except httpx.TransportError:
        return False


def final(server: ServerProcess) -> str:
    """What is answered where nothing fails."""
    answer = chat(server, temperature=0)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_small_crowd_is_answered_while_the_executive_s_server_fails(
    server: Any, executive: ScriptedServer, lora_bench: Bench
) -> None:
    """Six users at a server with one place; the memory model is an adapter of it."""
    undisturbed = final(server)
    fail(executive, "executive", random.Random(3), 8)
    heard = crowd(server, executive, 6)
    assert 200 in [one.status for one in heard]
    executive.reset()
    assert final(server) == undisturbed


@contextlib.contextmanager
def revived(scripted: ScriptedServer, model: str) -> Iterator[list[float]]:
    """Start a server again whenever it has died, a second later, with other faults before it. Gives when it was."""
    over, deaths = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.1):
            if scripted.process.poll() is not None:
                deaths.append(time.monotonic())
                time.sleep(1)
                scripted.start()
                fail(scripted, model, random.Random(5), len(FAULTS))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield deaths
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_thirty_users_while_the_executive_s_server_fails_in_every_way(
    lora_bench: Bench, start: Start, scripted: ScriptedServer, tmp_path: Path
) -> None:
    """It answers nonsense, breaks off, hangs and dies; the memory model is an adapter of this engine."""
    scripted.reset()
    told = {**section(scripted.spec("executive")), "at_once": 16, "waiting": 64}
    told |= {"backoff": 1.5, "call_seconds": 20.0, "budget": {"seeking_turns": 4, "seconds": 100.0}}
    server = start({"memo": told}, str(tmp_path / "log"))
    try:
        undisturbed = final(ready(server))
        fail(scripted, "executive", random.Random(3), len(FAULTS))
        scripted.fault("executive", "hang", skip=2)
        scripted.fault("executive", "die", skip=2)
        with revived(scripted, "executive") as deaths:
            heard = crowd(server, scripted, 30)
        print(sorted((one.status, one.text[:100]) for one in heard))
        assert len(deaths) == 1 and 200 in [one.status for one in heard]
        scripted.reset()
        assert final(server) == undisturbed
    finally:
        server.stop()
