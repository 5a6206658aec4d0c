"""The scripted server of the invented world in a process of its own, and runs of the protocol without any server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from mem_triton.systems.memo.protocol import machine
from mem_triton.systems.memo.protocol.settings import Settings
from mem_triton.systems.memo.protocol.state import Call, Event, Failed, Replied, State
from tests.support.checkout import ROOT
from tests.support.server import free_port, spawn


class ScriptedServer:
    """``benchmarks.memo.scripted`` over HTTP."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.options, self.log = free_port(), options, folder / "scripted.log"
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start it, again after it died, on the same port."""
        import os

        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}
        command = [sys.executable, "-m", "benchmarks.memo.scripted", "--port", str(self.port), *self.options]
        self.process = spawn(command, env, ROOT, self.log)
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/log", timeout=5)
                return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError(f"the scripted server did not start: {self.log.read_text()}")

    def spec(self, model: str) -> str:
        return f"{self.url}#{model}"

    def post(self, path: str, **body: Any) -> None:
        httpx.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=10).raise_for_status()

    def fault(self, model: str, kind: str, times: int = 1, skip: int = 0) -> None:
        self.post("/faults", model=model, kind=kind, times=times, skip=skip)

    def reset(self) -> None:
        self.post("/reset")

    def seen(self) -> dict[str, Any]:
        return httpx.get(f"http://127.0.0.1:{self.port}/log", timeout=10).json()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


Script = Callable[[Call], "str | Failed"]


def event_of(call: Call, said: str | Failed, at: float) -> Event:
    return said if isinstance(said, Failed) else Replied(call.id, call.attempt, said, at)


def play(
    settings: Settings, executive: Script, memory: Script, question: str = "Who is it?", most: int = 2000
) -> list[State]:
    """A run without a server, calls answered in their order; the states after each event."""
    state, _ = machine.start(question, settings)
    states = [state]
    while state.result is None:
        assert state.open, "a run that has not ended waits for something"
        assert len(states) < most, "the run does not end"
        call = next(iter(state.open.values()))
        said = (executive if call.to == "executive" else memory)(call)
        state, _ = machine.advance(state, event_of(call, said, at=len(states) * 1e-6))
        states.append(state)
    return states


def failed(call: Call, reason: str = "HTTP 500", **how: Any) -> Failed:
    return Failed(call.id, call.attempt, reason, 0.0, **how)


def sub(question: str, candidate: str = "") -> dict[str, Any]:
    return {"question": question, "candidate": candidate, "paraphrases": []}


def scripted(**stages: Any) -> Script:
    """An executive with one reply a stage: a value, or a function of the call."""

    def reply(call: Call) -> str | Failed:
        said = stages[call.schema]
        said = said(call) if callable(said) else said
        return said if isinstance(said, (str, Failed)) else json.dumps(said)

    return reply


GROUNDING = {"clues": [{"clue": "c", "value": "low", "questions": [sub("What is known?")]}], "combined": []}
FINAL = {"final_answer": "Norlux", "justification": "", "evidence": [1]}
