"""Streamed chat requests to a server, with the memory fields of each, and the time to their first token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.common.server import BenchmarkError, Server

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """text; tokens: output tokens; ttft: seconds to the first token, which engines send at once; prompt: its tokens;
    progress: what was said on the way to the answer."""

    text: str
    tokens: int
    ttft: float
    prompt: int = 0
    progress: str = ""


def user(text: str) -> Messages:
    """A conversation of one message of the user."""
    return [{"role": "user", "content": text}]


class Client:
    """Chat requests to one server, at most ``at_once`` at a time. fields_in: where a body takes memory's fields."""

    def __init__(self, url: str, at_once: int, fields_in: str) -> None:
        self.fields_in = fields_in
        # Servers close idle connections after 5 s: never reuse one that it may be closing just now.
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once, keepalive_expiry=2)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)
        self.free = asyncio.Semaphore(at_once)

    async def chat(
        self, messages: Messages, max_tokens: int = 16, memory: dict[str, Any] | None = None, **fields: Any
    ) -> Answer:
        """Send one streamed request with memory fields ``memory``. Raises BenchmarkError with the server's words."""
        body = {"model": "recall", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **({self.fields_in: memory} if memory else {}), **fields}
        text, progress, tokens, first, prompt = [], [], 0, None, 0
        async with self.free:
            start = time.perf_counter()
            try:
                async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        words = (await response.aread()).decode(errors="replace")[:800]
                        raise BenchmarkError(f"The server refused a request (HTTP {response.status_code}): {words}")
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        first = first or time.perf_counter() - start
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise BenchmarkError(f"The server failed in the middle of an answer: {event['error']}")
                        text += [choice["delta"].get("content") or "" for choice in event["choices"]]
                        progress += [choice["delta"].get("reasoning_content") or "" for choice in event["choices"]]
                        usage = event.get("usage") or {}
                        tokens, prompt = usage.get("completion_tokens", tokens), usage.get("prompt_tokens", prompt)
            except httpx.TransportError as error:
                raise BenchmarkError(f"The connection to the server broke: {error!r}") from None
        return Answer("".join(text).strip(), tokens, first or time.perf_counter() - start, prompt, "".join(progress))

    async def close(self) -> None:
        await self.http.aclose()


@asynccontextmanager
async def connected(servers: list[Server], at_once: int, fields_in: str) -> AsyncIterator[dict[str, Client]]:
    """Open one client a server, by the server's name; all are closed at the end.

    Raises BenchmarkError with the log of a server that died, which explains a failure better than its client can.
    """
    clients = {server.name: Client(server.url, at_once, fields_in) for server in servers}
    try:
        yield clients
    except BenchmarkError:
        for server in servers:
            server.check()
        raise
    finally:
        for client in clients.values():
            await client.close()
