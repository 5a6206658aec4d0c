"""Calls of a run: their upper bounds, the budgets that they must fit into, their repetition, and what they cost."""

from __future__ import annotations

from dataclasses import replace

from mem_triton.systems.memo.protocol.settings import TEMPLATE_TOKENS
from mem_triton.systems.memo.protocol.state import Call, Failed, Message, Replied, Role, Spent, Stage, State

LONGEST_WAIT = 30.0
"""Seconds before a repetition, whatever the server asks for."""
MESSAGE_TOKENS = 16
"""Tokens that a message adds to its text."""


def prompt_bound(messages: tuple[Message, ...]) -> int:
    """Most tokens that a prompt has: tokenizers of bytes make at most one token a byte."""
    return TEMPLATE_TOKENS + sum(len(message.content.encode()) + MESSAGE_TOKENS for message in messages)


def lacking(state: State, to: Role, prompt: int, completion: int) -> str | None:
    """The budget that a call does not fit into, None if it fits. Before the last stage, its call is held back."""
    settings, spent = state.settings, state.spent
    budget, held = settings.budget, Spent()
    if state.stage is not Stage.SYNTHESIS:
        held = Spent(1, 0, settings.last_prompt_tokens, settings.executive_tokens)
    if spent.seconds >= state.deadline:
        return "seconds"
    if to == "executive" and spent.executive_calls + 1 + held.executive_calls > budget.executive_calls:
        return "executive_calls"
    if to == "memory" and spent.memory_calls + 1 > budget.memory_calls:
        return "memory_calls"
    if spent.prompt_tokens + prompt + held.prompt_tokens > budget.prompt_tokens:
        return "prompt_tokens"
    if spent.completion_tokens + completion + held.completion_tokens > budget.completion_tokens:
        return "completion_tokens"
    return None


def send(
    state: State, to: Role, messages: tuple[Message, ...], *, schema: str | None = None, reasks: int = 0
) -> Call | None:
    """Make a call, or remember the budget that it does not fit into and return None."""
    settings, memory = state.settings, to == "memory"
    name = f"memory_{state.stage}" if memory else str(state.stage)
    call = Call(
        id=state.next_id,
        attempt=1,
        to=to,
        stage=state.stage,
        turn=state.turn,
        messages=messages,
        temperature=getattr(settings.temperatures, name),
        seed=(settings.seed + state.next_id) % 2**31,
        max_tokens=settings.memory_tokens if memory else settings.executive_tokens,
        prompt_tokens=prompt_bound(messages),
        seconds=settings.call_seconds,
        schema=schema,
        reasks=reasks,
    )
    if not _put(state, call):
        return None
    state.next_id += 1
    return call


def again(state: State, call: Call, failure: Failed) -> bool:
    """Repeat a call that failed, if it may succeed, fits into the budgets and is not too often; else False."""
    settings = state.settings
    if not failure.retryable or call.attempt > settings.retries:
        return False
    delay = min(max(failure.wait, settings.backoff * 2 ** (call.attempt - 1)), LONGEST_WAIT)
    if state.spent.seconds + delay >= state.deadline:
        return False
    return _put(state, replace(call, attempt=call.attempt + 1, delay=delay))


def _put(state: State, call: Call) -> bool:
    if (budget := lacking(state, call.to, call.prompt_tokens, call.max_tokens)) is not None:
        state.exhausted(budget)
        return False
    left = state.deadline - state.spent.seconds - call.delay
    call = replace(call, seconds=min(state.settings.call_seconds, left))
    spent = state.spent
    state.spent = replace(
        spent,
        executive_calls=spent.executive_calls + (call.to == "executive"),
        memory_calls=spent.memory_calls + (call.to == "memory"),
        prompt_tokens=spent.prompt_tokens + call.prompt_tokens,
        completion_tokens=spent.completion_tokens + call.max_tokens,
    )
    state.open[call.id] = call
    state.outbox.append(call)
    return True


def settle(state: State, call: Call, event: Replied) -> None:
    """Count what a reply has really cost, where the server says so. A call that failed keeps its upper bounds."""
    prompt = call.prompt_tokens if event.prompt_tokens is None else event.prompt_tokens
    completion = call.max_tokens if event.completion_tokens is None else event.completion_tokens
    state.spent = replace(
        state.spent,
        prompt_tokens=state.spent.prompt_tokens + prompt - call.prompt_tokens,
        completion_tokens=state.spent.completion_tokens + completion - call.max_tokens,
    )
