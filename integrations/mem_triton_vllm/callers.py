"""Keeps the HTTP headers of the request that a task of vLLM's server answers: its API key names the tenant.

vLLM's handlers do not hand them to the engine, but they call it in the context that they are called in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from starlette.datastructures import Headers

from mem_triton.config import ConfigError

APP = "vllm.entrypoints.launchers.app"
ADDS_MIDDLEWARE = "init_entrypoints_middleware"

_HEADERS: ContextVar[Mapping[str, str] | None] = ContextVar("mem_triton_headers", default=None)


def headers() -> Mapping[str, str]:
    """Return the headers of the HTTP request under way; none outside of one, which is then no tenant's."""
    return _HEADERS.get() or {}


class KeepHeaders:
    """ASGI middleware: what handles a request finds its headers in its context."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        token = _HEADERS.set(Headers(scope=scope))
        try:
            await self.app(scope, receive, send)
        finally:
            _HEADERS.reset(token)


def install() -> None:
    """Let the server that is built next keep its requests' headers. Raises ConfigError where vLLM has no such place."""
    app = import_module(APP)
    stock = getattr(app, ADDS_MIDDLEWARE, None)
    if stock is None:
        raise ConfigError(f"mem_triton.tenants: this vLLM has no {APP}.{ADDS_MIDDLEWARE}, so API keys cannot be read")
    if getattr(stock, "_mem_triton", False):
        return

    def adds_middleware(args: Any, app: Any, *rest: Any, **options: Any) -> None:
        stock(args, app, *rest, **options)
        app.add_middleware(KeepHeaders)  # the outermost: whatever runs inside has the headers

    adds_middleware._mem_triton = True
    setattr(import_module(APP), ADDS_MIDDLEWARE, adds_middleware)
