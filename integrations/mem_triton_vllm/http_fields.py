"""Refuses fields that vLLM's HTTP server, or ``vllm run-batch``, would drop."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from mem_triton.runtime.frontend.chat_models import AnswerChatModels
from mem_triton.runtime.frontend.http_fields import FieldPlaces, RefuseMisplacedFields
from mem_triton.systems.base import ChatPart
from mem_triton_vllm import callers, front_end


def _beam_search(body: Mapping[str, Any]) -> str | None:
    """Its steps are requests of vLLM's own making, without the client's extra arguments."""
    value = body.get("use_beam_search")
    off = value.lower() in ("", "0", "off", "f", "false", "n", "no") if isinstance(value, str) else not value
    return None if off else "beam search"


XARGS = "vllm_xargs"
PLACES = FieldPlaces(
    {
        "/v1/completions": XARGS,
        "/v1/chat/completions": XARGS,
        "/v1/chat/completions/batch": XARGS,
        "/v1/responses": XARGS,
        "/v1/messages": XARGS,
        "/invocations": XARGS,
        "/v1/audio/transcriptions": XARGS,
        "/v1/audio/translations": XARGS,
        "/v1/completions/render": XARGS,
        "/v1/chat/completions/render": XARGS,
        "/v1/responses/render": XARGS,
        "/v1/messages/render": XARGS,
        "/inference/v1/generate": "sampling_params.extra_args",
    },
    _beam_search,
)
"""Where vLLM's routes take what reaches ``SamplingParams.extra_args``."""


def install() -> None:
    """Refuse such fields in the servers that this process starts from now on."""
    from vllm.entrypoints.launchers import app, run_batch

    if not hasattr(app.init_entrypoints_middleware, "_mem_triton_fields"):
        app.init_entrypoints_middleware = _with_refusals(app.init_entrypoints_middleware)
        run_batch.run_request = _refusing(run_batch.run_request)


def chats_of(scope: Mapping[str, Any]) -> Mapping[str, ChatPart]:
    """The chat models of a server, of a request's scope; the endpoint plugin makes them."""
    return getattr(scope["app"].state, "mem_triton_chats", {})


def _hear(scope: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """``/v1/responses`` calls the engine when its stream has begun, too late for HTTP 400."""
    scope["app"].state.engine_client.memory.check_fields(fields, callers.headers())


def _with_refusals(stock: Any) -> Any:
    @functools.wraps(stock)
    def init_entrypoints_middleware(args: Namespace, app: FastAPI, *rest: Any, **more: Any) -> None:
        stock(args, app, *rest, **more)
        if not any(one.cls is RefuseMisplacedFields for one in app.user_middleware):
            # the innermost: behind authentication
            app.user_middleware.append(Middleware(RefuseMisplacedFields, places=PLACES, heard=_hear))
            app.user_middleware.append(Middleware(AnswerChatModels, chats=chats_of))

    init_entrypoints_middleware._mem_triton_fields = True
    return init_entrypoints_middleware


def _refusing(stock: Any) -> Any:
    @functools.wraps(stock)
    async def run_request(serving_engine_func: Any, request: Any, *rest: Any, **more: Any) -> Any:
        body = request.body
        said = {**(body.model_extra or {}), **{name: getattr(body, name) for name in type(body).model_fields}}
        if (error := PLACES.check(request.url, said)) is not None:

            async def serving_engine_func(body: Any) -> Any:
                raise front_end.refused(error)

        return await stock(serving_engine_func, request, *rest, **more)

    return run_request
