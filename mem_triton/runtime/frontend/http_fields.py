"""Refuses requests whose memory fields an HTTP server would drop, instead of answering them without memory.

Servers ignore fields that they do not know, and not every route hands a request's extra arguments on. This looks at a
request's body before the routes do; one without a memory field costs a search for four bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton.systems.registry import count_refusal
from mem_triton.systems.request import RequestError

MARK = "mem_"
CONTAINERS = (
    "",
    "vllm_xargs",
    "custom_params",
    "extra_body",
    "extra_args",
    "sampling_params",
    "sampling_params.extra_args",
    "sampling_params.custom_params",
    "extra_body.vllm_xargs",
    "extra_body.custom_params",
    "options",
    "parameters",
    "parameters.sampling_params",
    "parameters.sampling_params.custom_params",
    "kv_transfer_params",
)
"""Where people put fields, as paths of names; "": the top of the body."""
LONGEST = 64
"""Characters of a field that are repeated to who said it."""
_FORM_FIELD = re.compile(rb'name="(mem_\w{1,60})"')

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def _no_kind(body: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class FieldPlaces:
    """routes: path -> the place in its body that takes fields. unfit: the kind of a request that
    would drop them in their place, too, "beam search" for example; None for others."""

    routes: Mapping[str, str]
    unfit: Callable[[Mapping[str, Any]], str | None] = _no_kind

    def check(self, path: str, body: Any) -> RequestError | None:
        """Why a request with this body would lose a field, None if it would not."""
        if not isinstance(body, Mapping):
            return None
        place = self.routes.get(path.rstrip("/"))
        for container, field in _said(body, dict.fromkeys([*CONTAINERS, *self.routes.values()])):
            if place is None:
                routes = ", ".join(self.routes)
                return RequestError(field, f"{path} has no memory and would ignore it; these routes have one: {routes}")
            if container != place:
                example: Any = {field: "..."}
                for name in reversed(place.split(".")):
                    example = {name: example}
                return RequestError(field, f"would be ignored here; it belongs into {place}: {json.dumps(example)}")
            if (kind := self.unfit(body)) is not None:
                return RequestError(field, f"{kind} cannot use memory; ask without it, or without the field")
        return None

    def fields(self, path: str, body: Any) -> Mapping[str, Any]:
        """What the body says in the route's own place; nothing if that is no table."""
        for name in self.routes.get(path.rstrip("/"), "").split("."):
            body = body.get(name) if isinstance(body, Mapping) else None
        return body if isinstance(body, Mapping) else {}


def _said(body: Mapping[str, Any], containers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(container, field) of each memory field in a body."""
    for container in containers:
        values = [body]
        for name in filter(None, container.split(".")):
            values = [inner for value in values for inner in _as_list(value.get(name))]
        for value in values:
            yield from ((container, name[:LONGEST]) for name in value if name.startswith(MARK))


def _as_list(value: Any) -> list[Mapping[str, Any]]:
    """A batch has a list of them."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Mapping)]


class RefuseMisplacedFields:
    """ASGI middleware that answers HTTP 400 where a server would ignore a memory field.

    heard: looks at (scope, fields) of a stream whose fields are in their place; RequestErrors are answered before it
    begins. Some routes run a request only when they have begun to answer it.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        places: FieldPlaces,
        heard: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._app, self._places, self._heard = app, places, heard

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        raw, replay = await body_of(receive)
        if (error := self._refusal(scope, raw)) is not None:
            count_refusal(error.field)
            await send_json(send, 400, refusal_of(error))
            return
        await self._app(scope, replay, send)

    def _refusal(self, scope: dict[str, Any], raw: bytes) -> RequestError | None:
        if MARK.encode() not in raw:
            return None
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            body = json.loads(raw)
            if (error := self._places.check(path, body)) is not None:
                return error
            fields = self._places.fields(path, body)
            if self._heard is not None and fields and body.get("stream"):
                self._heard(scope, fields)
            return None
        except RequestError as error:
            return error
        except (ValueError, RecursionError):  # no JSON, or none that the server would read
            field = _FORM_FIELD.search(raw)
            return None if field is None else RequestError(field[1].decode(), "is no field of this form")


async def body_of(receive: Receive) -> tuple[bytes, Receive]:
    """A request's whole body, and what gives the request anew from its beginning."""
    messages, parts = [], []
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
        parts.append(messages[-1].get("body", b""))

    async def replay() -> dict[str, Any]:
        return messages.pop(0) if messages else await receive()

    return b"".join(parts), replay


def refusal_of(error: RequestError, path: str = "") -> dict[str, Any]:
    """The body of HTTP 400, in the forms of OpenAI's clients and SGLang's, on Anthropic's routes in theirs."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": "invalid_request_error", "message": str(error)}}
    reason = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": 400}
    return {"object": "error", "error": reason, **reason}


async def send_json(send: Send, status: int, said: Mapping[str, Any]) -> None:
    """Answer a request."""
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
