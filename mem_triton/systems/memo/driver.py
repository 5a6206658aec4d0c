"""Makes the calls that the protocol requests, and returns their results to it.

Whoever waits for ``run`` may leave at any time: cancelling it cancels every call that is open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mem_triton.systems.memo.endpoint import Answer, CallError
from mem_triton.systems.memo.protocol import machine
from mem_triton.systems.memo.protocol.schemas import json_schema
from mem_triton.systems.memo.protocol.settings import Settings
from mem_triton.systems.memo.protocol.stages import SCHEMAS
from mem_triton.systems.memo.protocol.state import Call, Elapsed, Event, Failed, Replied, Role, State
from mem_triton.systems.memo.trace import Trace

TOP_P = 0.95
"""Of the executive's calls, as the authors send it; the memory model has its checkpoint's default."""


class Chat(Protocol):
    """A model that is asked: ``endpoint.Endpoint``, or a served model in this process."""

    async def chat(self, messages: list[dict[str, str]], **options: Any) -> Answer: ...


Watch = Callable[[State, list[Call], Event | None], None]
"""Sees each step: the state after it, the calls that it wants, and the event, None for the first."""


async def run(
    question: str,
    settings: Settings,
    models: Mapping[Role, Chat],
    watch: Watch = lambda *step: None,
    clock: Callable[[], float] = time.monotonic,
) -> Trace:
    """Ask a question; the trace holds its result, which may be an error. Raises RequestError for a bad question.

    clock: seconds; what a test puts in its place makes times reproducible.
    """
    began = clock()
    events: list[Event] = []
    ready: asyncio.Queue[Event] = asyncio.Queue()
    tasks: dict[tuple[int, int], asyncio.Task[None]] = {}

    async def make(call: Call) -> None:
        if call.delay:
            await asyncio.sleep(call.delay)
        ready.put_nowait(await _ended(call, models[call.to], lambda: clock() - began))

    state, calls = machine.start(question, settings)
    watch(state, calls, None)
    try:
        while state.result is None:
            for call in calls:
                tasks[call.id, call.attempt] = asyncio.create_task(make(call))
            event = await _next(ready, state.deadline - (clock() - began), lambda: clock() - began)
            events.append(event)
            state, calls = machine.advance(state, event)
            watch(state, calls, event)
            open_now = {(call.id, call.attempt) for call in state.open.values()}
            for key in [key for key in tasks if key not in open_now]:
                tasks.pop(key).cancel()
    finally:
        for task in tasks.values():
            task.cancel()
        if tasks:  # not gather: whoever is cancelled twice would cancel twice, and cut off the closing of a connection
            await asyncio.wait(tasks.values())
    return Trace(question, settings, tuple(events))


async def _next(ready: asyncio.Queue[Event], seconds: float, now: Callable[[], float]) -> Event:
    """How a call ended, or that the stage's time is up."""
    if not ready.empty():
        return ready.get_nowait()
    try:
        async with asyncio.timeout(max(seconds, 0)):
            return await ready.get()
    except TimeoutError:
        return Elapsed(now())


async def _ended(call: Call, model: Chat, now: Callable[[], float]) -> Event:
    schema = (call.schema, json_schema(SCHEMAS[call.schema])) if call.schema is not None else None
    try:
        answer = await model.chat(
            [{"role": message.role, "content": message.content} for message in call.messages],
            max_tokens=call.max_tokens,
            temperature=call.temperature,
            seed=call.seed,
            schema=schema,
            top_p=TOP_P if call.to == "executive" and call.temperature else None,
            seconds=call.seconds,
        )
    except CallError as error:
        return Failed(
            call.id, call.attempt, str(error), now(), error.retryable, error.fatal, error.too_long, error.wait
        )
    except Exception as error:  # a fault of ours must not be taken for the model's ignorance, nor hang the run
        return Failed(call.id, call.attempt, f"{type(error).__name__}: {error}", now(), retryable=False)
    return Replied(call.id, call.attempt, answer.text, now(), answer.prompt_tokens, answer.completion_tokens)
