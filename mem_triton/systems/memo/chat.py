"""The model that both models are under one name: chat requests in, the protocol, chat completions out.

Progress comes as ``reasoning_content``, the answer as ``content``; ``usage`` sums every call. What cannot be served is
refused by name before anything is asked.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mem_triton import metrics
from mem_triton.systems.base import ChatHost, ChatPart
from mem_triton.systems.memo.driver import Chat, run
from mem_triton.systems.memo.endpoint import (
    Answer,
    CallError,
    Endpoint,
    EndpointError,
    answer_of,
    chat_body,
    refusal,
    well_formed,
)
from mem_triton.systems.memo.fields import unserved
from mem_triton.systems.memo.protocol.machine import start
from mem_triton.systems.memo.protocol.settings import GREEDY, Settings
from mem_triton.systems.memo.protocol.state import Call, Elapsed, Event, Replied, State, usage
from mem_triton.systems.memo.section import TRACE, MemoSection
from mem_triton.systems.memo.trace import Trace
from mem_triton.systems.request import RequestError, flag, shown

LIMITS = ("max_tokens", "max_completion_tokens")
LEAST_TOKENS = 64
"""Tokens that the executive needs at least for a reply of the protocol."""


class QueueFullError(Exception):
    """More answers wait for their turn than may."""


class ServedModel:
    """A model of this server, asked without HTTP. extra: fields that each of its requests has. caller: for whom."""

    def __init__(self, model: str, host: ChatHost, extra: Mapping[str, Any], caller: Any) -> None:
        self.model, self._host, self._extra, self._caller = model, host, extra, caller

    async def chat(self, messages: Sequence[Mapping[str, str]], *, seconds: float, **options: Any) -> Answer:
        """As ``Endpoint.chat``.

        vLLM answers a call that is cancelled, as if its client had left, and so swallows the cancellation: of the time
        that has run out, and of whoever waits for this answer.
        """
        late = CallError(f"no answer within {seconds:.3g} seconds")
        try:
            async with asyncio.timeout(seconds) as limit:
                body = {**chat_body(self.model, messages, **options), **self._extra}
                status, said = await self._host.served(body, self._caller)
        except TimeoutError:
            raise late from None
        if limit.expired():
            raise late
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError
        if status != 200:
            raise refusal(status, json.dumps(said))
        return answer_of(said)


class MemoChat(ChatPart):
    """Both models under one name. host: the server that they are models of."""

    def __init__(self, section: MemoSection, host: ChatHost) -> None:
        self.section, self.host, self.model = section, host, section.name
        self._endpoints = {spec: Endpoint(spec) for spec in (section.executive, section.memory) if "#" in spec}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._free = asyncio.Semaphore(section.at_once)
        self._inside = 0

    async def close(self) -> None:
        for check in self._checks.values():
            check.cancel()
        for endpoint in self._endpoints.values():
            await endpoint.close()

    def check(self, body: Mapping[str, Any]) -> None:
        if (name := unserved(body, {self.host.fields_in})) is not None:
            raise RequestError(name, f"is not served by {self.model} as it is here; leave it out")
        fields = self._fields(body)
        flag(fields, TRACE, False)
        if (others := sorted(set(fields) - {TRACE})) and "#" in self.section.executive:
            raise RequestError(others[0], f"is for a model of this server; {self.section.executive} is another's")
        start(self._question(body), self._settings(body))

    async def answer(self, body: Mapping[str, Any], caller: Any = None) -> tuple[int, dict[str, Any]]:
        progress: list[str] = []
        try:
            async with self._turn():
                trace = await self._run(body, progress.append, caller)
        except QueueFullError as error:
            return 429, _error(429, str(error))
        except EndpointError as error:
            return 502, _error(502, str(error))
        result = trace.result
        if result.kind == "error":
            return result.status, _error(result.status, result.text, self._told(body, trace))
        message = {"role": "assistant", "content": result.text, "reasoning_content": "".join(progress) or None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        said = self._head("chat.completion") | {"choices": [choice], "usage": usage(trace.final.spent)}
        return 200, said | self._told(body, trace)

    async def stream(self, body: Mapping[str, Any], caller: Any = None) -> AsyncIterator[str]:
        """Events as they come. Whoever stops reading and closes the iterator cancels what is asked."""
        head = self._head("chat.completion.chunk")
        parts: asyncio.Queue[str | None] = asyncio.Queue()

        async def work() -> Trace:
            try:
                async with self._turn():
                    return await self._run(body, parts.put_nowait, caller)
            finally:
                parts.put_nowait(None)

        yield _chunk(head, {"role": "assistant", "content": ""})
        task = asyncio.create_task(work())
        try:
            while (part := await parts.get()) is not None:
                yield _chunk(head, {"reasoning_content": part})
            try:
                trace = await task
            except (QueueFullError, EndpointError) as error:
                status = 429 if isinstance(error, QueueFullError) else 502
                yield _event(_error(status, str(error)))
                return
            result = trace.result
            if result.kind == "error":
                yield _event(_error(result.status, result.text, self._told(body, trace)))
                return
            yield _chunk(head, {"content": result.text})
            yield _chunk(head, {}, "stop", self._told(body, trace))
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({**head, "choices": [], "usage": usage(trace.final.spent)})
            yield "data: [DONE]\n\n"
        finally:
            task.cancel()
            await asyncio.wait({task})  # not gather, as in the driver
            if not task.cancelled():
                task.exception()  # what it was has been told, or nobody is there to hear it

    def busy(self) -> str | None:
        if self._inside < self.section.at_once + self.section.waiting:
            return None
        metrics.MEMO_ANSWERS.labels("full").inc()
        return f"{self.model}: {self._inside} answers are worked on or wait; try again later"

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait for a turn. Raises QueueFullError where too many wait already."""
        if (why := self.busy()) is not None:
            raise QueueFullError(why)
        began = time.monotonic()
        self._inside += 1
        metrics.MEMO_RUNNING.inc()
        try:
            async with self._free:
                yield
        except EndpointError:
            metrics.MEMO_ANSWERS.labels("error").inc()
            raise
        except asyncio.CancelledError:
            metrics.MEMO_ANSWERS.labels("left").inc()
            raise
        finally:
            self._inside -= 1
            metrics.MEMO_RUNNING.dec()
            metrics.MEMO_SECONDS.observe(time.monotonic() - began)

    async def _run(self, body: Mapping[str, Any], tell: Any, caller: Any) -> Trace:
        fields = {name: value for name, value in self._fields(body).items() if name != TRACE}
        models = {
            "executive": await self._model(
                self.section.executive, caller, {self.host.fields_in: fields} if fields else {}, structured=True
            ),
            "memory": await self._model(self.section.memory, caller, {}),
        }
        seen = 0

        def watch(state: State, calls: list[Call], event: Event | None) -> None:
            nonlocal seen
            for item in state.evidence[seen:]:
                tell(f"{item.question}\n→ {item.text if item.outcome == 'answer' else item.outcome}\n")
            seen = len(state.evidence)

        trace = await run(self._question(body), self._settings(body), models, watch)  # type: ignore[arg-type]
        _count(trace)
        return trace

    async def _model(self, spec: str, caller: Any, extra: Mapping[str, Any], structured: bool = False) -> Chat:
        if (endpoint := self._endpoints.get(spec)) is None:
            return ServedModel(spec, self.host, extra, caller)
        # Once, when the first request comes: both servers may start in any order. All that come meanwhile wait for the
        # same look, which goes on if one of them leaves; one that failed is made again by the next request.
        if (check := self._checks.get(spec)) is None or (check.done() and _failed(check)):
            check = self._checks[spec] = asyncio.create_task(endpoint.check(structured=structured))
            check.add_done_callback(_failed)  # whoever waited for it may have left
        await asyncio.shield(check)
        return endpoint

    def _settings(self, body: Mapping[str, Any]) -> Settings:
        told = self.section.model_dump(include=set(Settings.model_fields))
        if (seed := _number(body, "seed")) is not None:
            told["seed"] = seed % 2**31
        if body.get("temperature") == 0:
            told["temperatures"] = GREEDY.model_dump()
        if limits := [n for name in LIMITS if (n := _number(body, name)) is not None]:
            if min(limits) < LEAST_TOKENS:
                raise RequestError("max_tokens", f"must be at least {LEAST_TOKENS} for {self.model}, or left out")
            told["executive_tokens"] = min(told["executive_tokens"], *limits)
        return Settings.model_validate(told)

    def _question(self, body: Mapping[str, Any]) -> str:
        """The last message of the user; what was said before stands above it."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or messages[-1].get("role") != "user":
            raise RequestError("messages", "must end with a message of the user")
        said = [(str(message.get("role")), _text(message.get("content"))) for message in messages]
        if len(said) == 1:
            return said[0][1]
        before = "\n".join(f"{role}: {text}" for role, text in said[:-1])
        return f"{said[-1][1]}\n\n(Said before:\n{before})"

    def _fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Memory's fields of a request."""
        fields = body.get(self.host.fields_in) or {}
        if not isinstance(fields, Mapping):
            raise RequestError(self.host.fields_in, f"must be an object of names and values, got {shown(fields)}")
        return fields

    def _told(self, body: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
        wanted = flag(self._fields(body), TRACE, False)
        return {"mem_triton": {"memo": trace.document()}} if wanted else {}

    def _head(self, kind: str) -> dict[str, Any]:
        id = f"chatcmpl-memo-{uuid.uuid4().hex}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.model}


def _count(trace: Trace) -> None:
    """Count how a run ended, its calls, and the budgets that ended it."""
    ends = {(event.id, event.attempt): event for event in trace.events if not isinstance(event, Elapsed)}
    for call in (call for _, calls, _ in trace.steps() for call in calls):
        end = ends.get((call.id, call.attempt))
        outcome = "cut_off" if end is None else "replied" if isinstance(end, Replied) else "failed"
        metrics.MEMO_CALLS.labels(call.to, outcome).inc()
    metrics.MEMO_ANSWERS.labels(trace.result.kind).inc()
    for budget in trace.result.ended_by:
        metrics.MEMO_BUDGETS.labels(budget).inc()


def _failed(check: asyncio.Task[None]) -> bool:
    return check.cancelled() or check.exception() is not None


def _number(body: Mapping[str, Any], name: str) -> int | None:
    """A field that is a whole number, None for none. Raises RequestError for anything else."""
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise RequestError(name, f"must be a whole number, got {shown(value)}")


def _text(content: Any) -> str:
    """A message's text. Raises RequestError for images and other parts."""
    if isinstance(content, str) or content is None:
        return well_formed(content or "")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if any(text is None for text in texts):
        raise RequestError("messages", "holds a part that is no text; only text is served")
    return well_formed("\n".join(map(str, texts)))


def _error(status: int, message: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    kinds = {429: "rate_limit_error", 502: "bad_gateway", 504: "timeout"}
    return {
        "error": {"message": message, "type": kinds.get(status, "error"), "param": None, "code": status},
        **(more or {}),
    }


def _chunk(
    head: Mapping[str, Any], delta: Mapping[str, Any], finish: str | None = None, more: Mapping[str, Any] | None = None
) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return _event({**head, "choices": [choice], **(more or {})})


def _event(said: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"
