"""The protocol as a pure function: a state and an event give the next state and the calls to make.

Example::

    state, calls = start("Where was the founder of Norlux born?", Settings())
    while state.result is None:
        event = ...  # how one of the calls ended, or Elapsed(at) when state.deadline has passed
        state, calls = advance(state, event)

Calls that are no longer in ``state.open`` are of no interest any more; their replies change nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace

from mem_triton.systems.memo.protocol import stages
from mem_triton.systems.memo.protocol.asking import batch_is_heard, give_up_batch
from mem_triton.systems.memo.protocol.calls import again, send, settle
from mem_triton.systems.memo.protocol.parsing import read_reply
from mem_triton.systems.memo.protocol.prompts import reask
from mem_triton.systems.memo.protocol.settings import LONGEST_QUESTION, Settings
from mem_triton.systems.memo.protocol.state import Call, Elapsed, Event, Failed, Heard, Replied, Stage, State
from mem_triton.systems.memo.protocol.unknown import read_memory
from mem_triton.systems.request import RequestError

LEAST_HISTORY = 500
"""Bytes of replies below which a prompt that is too long is not shortened further."""


def start(question: str, settings: Settings) -> tuple[State, list[Call]]:
    """Begin a run. Raises RequestError for a question that is empty, too long or no text."""
    question = question.strip() if isinstance(question, str) else ""
    if not question:
        raise RequestError("question", "must be a text that is not empty")
    try:
        size = len(json.dumps(question, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise RequestError("question", "holds half of a surrogate pair, which is no text; correct it") from None
    if size > LONGEST_QUESTION:
        raise RequestError("question", f"is {size} bytes long; at most {LONGEST_QUESTION}")
    state = State(question, settings, history_bytes=settings.history_bytes)
    stages.begin(state)
    return state, _calls(state)


def advance(state: State, event: Event) -> tuple[State, list[Call]]:
    """The state after an event, and the calls to make now. The state that is given does not change."""
    state = state.copy()
    if state.result is not None:
        return state, []
    state.spent = replace(state.spent, seconds=max(state.spent.seconds, event.at))
    if not isinstance(event, Elapsed):
        call = state.open.get(event.id)
        if call is None or call.attempt != event.attempt:  # of a call that is over
            return state, []
        del state.open[event.id]
        _ended(state, call, event)
    if state.result is None and state.spent.seconds >= state.deadline:
        _time_is_up(state)
    return state, _calls(state)


def _calls(state: State) -> list[Call]:
    calls, state.outbox = [call for call in state.outbox if call.id in state.open], []
    return calls


def _ended(state: State, call: Call, event: Replied | Failed) -> None:
    if isinstance(event, Failed):
        if event.fatal:
            stages.fail(state, f"the {call.to} model: {event.reason}")
        elif not again(state, call, event):
            _failed(state, call, event)
        return
    settle(state, call, event)
    text = event.text.encode("utf-8", "replace").decode()
    if call.to == "executive":
        _replied(state, call, text)
        return
    kind, answer = read_memory(text)
    if kind == "refused":
        heard = Heard("failed", f"the model refused: {answer[:200]}")
    elif not answer and kind == "answer":
        failure = Failed(call.id, call.attempt, "the reply is empty", event.at)
        if again(state, call, failure):
            return
        heard = Heard("failed", failure.reason)
    else:
        heard = Heard(kind, answer.encode("utf-8", "replace").decode()[:2000])
    _heard(state, call, heard)


def _replied(state: State, call: Call, text: str) -> None:
    reply, wrong = read_reply(text, stages.SCHEMAS[call.schema])
    if reply is not None:
        stages.on_reply(state, call, reply)
    elif call.reasks or not send(
        state, "executive", reask(call.messages, text, wrong), schema=call.schema, reasks=call.reasks + 1
    ):
        stages.on_lost(state, call, wrong, text)


def _failed(state: State, call: Call, event: Failed) -> None:
    if call.to == "memory":
        _heard(state, call, Heard("failed", event.reason[:500]))
    elif event.too_long and state.history_bytes > LEAST_HISTORY:
        state.history_bytes = max(state.history_bytes // 2, LEAST_HISTORY)
        state.note(f"the prompt was too long; replies are shortened to {state.history_bytes} bytes, the oldest first")
        stages.ask_executive(state)
    else:
        stages.on_lost(state, call, event.reason[:500], None)


def _heard(state: State, call: Call, heard: Heard) -> None:
    state.heard[call.id] = heard
    if batch_is_heard(state):
        stages.on_batch(state)


def _time_is_up(state: State) -> None:
    """The stage's time is over: what is open is given up, and the last stage runs on what is known."""
    state.exhausted("seconds")
    if state.stage is Stage.SYNTHESIS:
        stages.fail(state, f"the executive model gave no answer within {state.settings.budget.seconds:g} seconds", 504)
        return
    waiting = bool(state.batch)
    state.open.clear()
    give_up_batch(state, "time ran out")
    if waiting:
        stages.on_batch(state)
    else:
        stages.leave(state, last=True)
    if state.stage is Stage.SYNTHESIS and state.spent.seconds >= state.deadline:
        stages.fail(state, f"no time was left for the last answer ({state.settings.budget.seconds:g} seconds)", 504)
