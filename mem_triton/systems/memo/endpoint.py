"""A model behind an OpenAI-compatible endpoint: one chat request at a time, its reply or what went wrong.

Nothing is repeated here: repetitions are the protocol's, which counts them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
LONGEST_BODY = 4 * 2**20
"""Bytes of a response that are read."""
_SPEC = re.compile(r"(?P<url>https?://[^\s#]+)#(?P<model>\S.*)")
_FATAL = {401: "the API key is wrong or missing", 403: "the API key may not do this", 404: "no such model or path"}
_RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_TOO_LONG = re.compile(
    r"context.{0,20}length|maximum context|too long|too many tokens|longer than the model", re.IGNORECASE
)
_PROBE = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


class EndpointError(ValueError):
    """An endpoint that is misspelt, or that cannot serve at all: no such model, a wrong key."""


@dataclass(frozen=True)
class Answer:
    """A reply. tokens: as the server counts them, None where it does not. cut: it ended at its limit."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cut: bool = False


class CallError(Exception):
    """A call that gave no reply. retryable, fatal, too_long, wait: as in ``protocol.state.Failed``.

    refused: the server said no, so that it generated nothing.
    """

    def __init__(
        self,
        reason: str,
        *,
        retryable: bool = True,
        fatal: bool = False,
        too_long: bool = False,
        wait: float = 0.0,
        refused: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retryable, self.fatal, self.too_long, self.wait = retryable, fatal, too_long, wait
        self.refused = refused


class Endpoint:
    """A model of a server, as ``URL#MODEL`` names it; the server's key is in the environment's OPENAI_API_KEY.

    Example::

        async with Endpoint("http://localhost:8000/v1#memo") as memory:
            await memory.check()
            answer = await memory.chat([{"role": "user", "content": "Who founded Norlux?"}], max_tokens=64)
    """

    def __init__(self, spec: str, *, at_once: int = 64, key: str | None = None) -> None:
        """spec: the address as OpenAI's clients take it, with /v1, and the model's name. Raises EndpointError."""
        found = _SPEC.fullmatch(spec.strip())
        if found is None:
            raise EndpointError(f'endpoint {spec!r}: write "URL#MODEL", such as http://localhost:8000/v1#memo')
        self.url, self.model = found["url"].rstrip("/"), found["model"].strip()
        self.structured: bool | None = None
        """Whether it takes JSON schemas; None until ``check`` has tried."""
        key = key or os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Servers close idle connections after 5 s: never reuse one that it may be closing just now.
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once, keepalive_expiry=2)
        # Certificates take a tenth of a second to load, and plain HTTP has none.
        verify = self.url.startswith("https:")
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=None, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def check(self, *, structured: bool = False, seconds: float = 30.0) -> None:
        """See that the server is there and has the model, and whether it takes JSON schemas, if ``structured``.

        Raises EndpointError naming what is wrong.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._check_model()
                if structured and self.structured is None:
                    self.structured = await self._takes_schemas(seconds)
        except TimeoutError:
            raise EndpointError(f"{self.url}: no answer within {seconds:g} seconds") from None

    async def _check_model(self) -> None:
        try:
            response = await self._http.get(f"{self.url}/models")
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.url}: cannot be reached ({_told(error)})") from None
        if response.status_code in (401, 403):
            raise EndpointError(f"{self.url}: {_FATAL[response.status_code]} (HTTP {response.status_code}); set {KEY}")
        try:
            models = [str(one["id"]) for one in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return  # a server that does not list its models
        if models and self.model not in models:
            raise EndpointError(f"{self.url}: has no model {self.model!r}; it has {', '.join(models[:20])}")

    async def _takes_schemas(self, seconds: float) -> bool:
        messages = [{"role": "user", "content": 'Reply with the JSON object {"ok": true}.'}]
        try:
            answer = await self.chat(
                messages, max_tokens=32, temperature=0.0, schema=("probe", _PROBE), seconds=seconds
            )
            took = isinstance(json.loads(answer.text).get("ok"), bool)
        except CallError as error:
            if error.fatal or error.retryable:
                raise EndpointError(f"{self.url}: {error}") from None
            took = False
        except (ValueError, AttributeError):
            took = False
        if not took:
            logger.warning(
                "mem_triton: %s does not follow JSON schemas; %s is asked in words alone", self.url, self.model
            )
        return took

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        schema: tuple[str, Mapping[str, Any]] | None = None,
        seconds: float = 60.0,
    ) -> Answer:
        """One request. Raises CallError for whatever gives no text: refused, timed out, broken, empty of content."""
        schema = schema if self.structured is not False else None
        body = chat_body(
            self.model, messages, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, schema=schema
        )
        try:
            async with asyncio.timeout(seconds), self._post(body) as response:
                data = await _body(response)
        except TimeoutError:
            raise CallError(f"no answer within {seconds:.3g} seconds") from None
        except httpx.HTTPError as error:
            raise CallError(f"the connection broke ({_told(error)})") from None
        if response.status_code != 200:
            said = data.decode(errors="replace")
            raise refusal(response.status_code, said, response.headers.get("retry-after", "0"))
        try:
            return answer_of(json.loads(data))
        except (ValueError, RecursionError):
            raise CallError(f"the response is no JSON: {data[:200].decode(errors='replace')!r}") from None

    def _post(self, body: Mapping[str, Any]) -> AbstractAsyncContextManager[httpx.Response]:
        content = json.dumps(body, ensure_ascii=True).encode()
        headers = {"Content-Type": "application/json"}
        return self._http.stream("POST", f"{self.url}/chat/completions", content=content, headers=headers)


async def _body(response: httpx.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > LONGEST_BODY:
            raise CallError(f"the response is longer than {LONGEST_BODY} bytes", retryable=False)
        parts.append(part)
    return b"".join(parts)


def chat_body(
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    schema: tuple[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A chat request as OpenAI's API has it. schema: (name, JSON schema) of the reply."""
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    body |= {name: value for name, value in (("top_p", top_p), ("seed", seed)) if value is not None}
    if schema is not None:
        shape = {"name": schema[0], "schema": schema[1], "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": shape}
    return body


def refusal(status: int, said: str, retry_after: str = "0") -> CallError:
    """What a response that is not HTTP 200 means."""
    said = " ".join(said.split())[:300]
    told = f"HTTP {status}: {_FATAL[status]}: {said}" if status in _FATAL else f"HTTP {status}: {said}"
    try:
        wait = max(0.0, min(float(retry_after), 3600.0))
    except ValueError:  # a date, or nonsense
        wait = 0.0
    return CallError(
        told,
        retryable=status in _RETRYABLE,
        fatal=status in _FATAL,
        too_long=status == 413 or (status in (400, 422) and _TOO_LONG.search(said) is not None),
        wait=wait,
        refused=True,
    )


def answer_of(said: Any) -> Answer:
    """The reply in a chat completion. Raises CallError for what is none."""
    try:
        choice = said["choices"][0]
        message, usage = choice["message"], said.get("usage") or {}
        content = message.get("content")
        prompt, completion = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    except (LookupError, TypeError, AttributeError):
        raise CallError(f"the response is no chat completion: {str(said)[:200]}") from None
    if message.get("refusal"):
        raise CallError(f"the model refused: {str(message['refusal'])[:200]}", retryable=False)
    if not isinstance(content, str):  # a tool call and no text: the protocol says that the reply is empty
        content = ""
    return Answer(well_formed(content), prompt, completion, choice.get("finish_reason") == "length")


def well_formed(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which JSON can say and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
