"""Gives a server the chat models of memory systems: makes them, lists them, and refuses them where they are not served.

A chat model has a name beside the engine's own models and answers chat completions alone. Every other route that names
it is answered with HTTP 400: servers take an unknown name for another model's, or say that it does not exist.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from mem_triton.config import MemTritonConfig
from mem_triton.runtime.frontend.http_fields import Receive, Send, body_of, refusal_of, send_json
from mem_triton.schema import ConfigError
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, ChatHost, ChatPart
from mem_triton.systems.request import RequestError

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
LEFT = 499
"""Status of an answer that nobody waits for any more."""
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)')
_NAMING = ("model", "lora_name")
"""Fields of a body that name a model: one that is asked, and one that is loaded."""
_TOKENIZING = frozenset({"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"})
"""Routes whose answers an adapter changes nothing in."""

Chats = Mapping[str, ChatPart]
Listed = Callable[[], Awaitable[dict[str, Any]]]
"""The server's own list of models, as OpenAI's API has it."""
Adapters = Callable[[], Mapping[str, str]]
"""Names of LoRA adapters that the server's handlers take for the base model's -> the name that they understand."""


def chat_models(config: MemTritonConfig, host: ChatHost, taken: Iterable[str]) -> dict[str, ChatPart]:
    """The chat models that are configured, by name. Raises ConfigError for one with a name that is taken."""
    names, found = set(taken), {}
    for name in config.systems:
        system = registry.systems()[name]
        if Capability.CHAT in system.requires and (part := system.chat(config, host)) is not None:
            if part.model in names:
                raise ConfigError(f"mem_triton.{name}.name: {part.model!r} is a model of this server already")
            found[part.model] = part
            names.add(part.model)
    return found


def with_chats(listed: Mapping[str, Any], chats: Iterable[str]) -> dict[str, Any]:
    """The server's list of models with the chat models behind it."""
    return {**listed, "data": [*listed["data"], *(_card(listed, name) for name in chats)]}


def _card(listed: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**listed["data"][0], "id": name, "root": name, "parent": None, "owned_by": "mem_triton"}


async def respond(part: ChatPart, body: Mapping[str, Any], stream: bool, request: Any) -> Any:
    """Answer a client's request to a chat model, as a response of starlette's. request: the client's, as starlette has
    it, whose body has been read."""
    from starlette.responses import JSONResponse, StreamingResponse  # the engine's server brings it along

    try:
        part.check(body)
    except RequestError as error:
        registry.count_refusal(error.field)
        return JSONResponse(refusal_of(error), status_code=400)
    if (why := part.busy()) is not None:
        status, said = 429, {"error": {"message": why, "type": "rate_limit_error", "param": None, "code": 429}}
    elif stream:
        return StreamingResponse(_events(part, body, request), media_type="text/event-stream")
    else:
        status, said = await until_gone(part.answer(body, request), request.receive)
    return JSONResponse(said, status_code=status, headers={"Retry-After": "1"} if status == 429 else None)


async def _events(part: ChatPart, body: Mapping[str, Any], caller: Any) -> AsyncIterator[str]:
    """The stream. The response that reads it listens for a client that leaves, and cancels it; that closes what it
    asks."""
    async with aclosing(part.stream(body, caller)) as parts:  # type: ignore[type-var]
        async for event in parts:
            yield event


async def until_gone(
    answer: Coroutine[Any, Any, tuple[int, dict[str, Any]]], receive: Receive
) -> tuple[int, dict[str, Any]]:
    """The answer to a request whose body has been read; cancelled as soon as its client leaves.

    receive: of the request, as ASGI has it.
    """
    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return LEFT, {}
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
        for task in (working, leaving):
            if not task.cancelled():
                task.exception()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerChatModels:
    """ASGI middleware that answers what concerns chat models on every route but that of chat completions.

    chats: the chat models, of a request's scope. listed: the server's own list of models; None where the server's
    route knows of chat models. served: the paths whose handlers answer chat models, and adapters by any name. adapters:
    whose names are refused on all others, so that the base model never answers in their place.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        chats: Callable[[Mapping[str, Any]], Chats],
        listed: Listed | None = None,
        served: Iterable[str] = (CHAT,),
        adapters: Adapters = dict,
    ) -> None:
        self._app, self._chats, self._listed, self._served = app, chats, listed, frozenset(served)
        self._adapters = adapters

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (chats := self._chats(scope)):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if scope["method"] == "GET" and self._listed is not None and path.startswith(MODELS):
            name = path.removeprefix(MODELS).removeprefix("/")
            if not name:
                await send_json(send, 200, with_chats(await self._listed(), chats))
                return
            if name in chats:
                await send_json(send, 200, _card(await self._listed(), name))
                return
        if scope["method"] not in ("POST", "PUT") or path in self._served:
            await self._app(scope, receive, send)
            return
        raw, replay = await body_of(receive)
        if (error := self._refusal(path, raw, chats)) is None:
            await self._app(scope, replay, send)
            return
        registry.count_refusal(error.field)
        await send_json(send, 400, refusal_of(error, path))

    def _refusal(self, path: str, raw: bytes, chats: Chats) -> RequestError | None:
        adapters = {} if path in _TOKENIZING else self._adapters()
        if (found := _named(raw, {**adapters, **chats})) is None:
            return None
        field, name = found
        if name not in chats:
            if field != "model":
                return None
            said = f"{name!r} is a LoRA adapter, in whose place {path} would ask the base model"
            return RequestError(field, f"{said}; ask {CHAT}, or for {adapters[name]!r} where a route takes adapters")
        if field == "lora_name":
            return RequestError(field, f"{name!r} is a model of mem_triton's; load the adapter under another name")
        return RequestError(field, f"{name!r} is not served by {path}; it answers {CHAT} alone")


def _named(raw: bytes, names: Collection[str]) -> tuple[str, str] | None:
    """(field, name) of a body that names one of these models, in JSON or in a form."""
    plain = b"\\" not in raw and b"\0" not in raw  # neither escapes nor wide characters
    if plain and not any(name.encode() in raw for name in names):
        return None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        found = _FORM_MODEL.search(raw)
        name = found[1].decode(errors="replace") if found else ""
        return ("model", name) if name in names else None
    if isinstance(body, dict):
        for field in _NAMING:
            if isinstance(name := body.get(field), str) and name in names:
                return field, name
    return None
