"""Serves chat models of memory systems, by routes beside vLLM's own.

An endpoint plugin by vLLM's contract (``vllm/plugins/endpoint_plugins/interface.py``): a route of the same path and
method takes the stock one's place. Requests for other models go to the stock handler as they came.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from mem_triton.config import parse_config
from mem_triton.schema import ConfigError
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, ChatPart
from mem_triton.systems.request import RequestError


class ChatModels:
    """The plugin: vLLM makes one in each API server where ``VLLM_PLUGINS`` names ``mem_triton``."""

    name = "mem_triton"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; without a chat model of a memory system they only hand on."""
        chat, models = "/v1/chat/completions", "/v1/models"
        checked = [Depends(validate_json_request)]
        app.add_api_route(chat, _chat, methods=["POST"], dependencies=checked, response_model=None)
        app.add_api_route(models, _models, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Make the chat models that the configuration asks for. Raises ConfigError naming what is wrong with it."""
        state.mem_triton_chats = {}
        section = (getattr(args, "additional_config", None) or {}).get("mem_triton")
        if section is None:
            return
        config = parse_config(section)
        names = {model.name for model in state.openai_serving_models.base_model_paths}
        names |= set(state.openai_serving_models.lora_requests)
        for name in config.systems:
            system = registry.systems()[name]
            if Capability.CHAT in system.requires and (part := system.chat(config, _served(state))) is not None:
                if part.model in names:
                    raise ConfigError(f"mem_triton.{name}.name: {part.model!r} is a model of this server already")
                state.mem_triton_chats[part.model] = part


def _served(state: Any) -> Any:
    """Asks a model of this server, in this process, with the server's own limits and adapters."""

    async def served(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            answer = await state.openai_serving_chat.create_chat_completion(ChatCompletionRequest(**body))
        except ValueError as error:  # what vLLM's own route answers with HTTP 400
            return 400, {"error": {"message": str(error)}}
        if isinstance(answer, ErrorResponse):
            return int(answer.error.code), answer.model_dump()
        return 200, answer.model_dump()

    return served


async def _models(raw_request: Request) -> Response:
    stock = await show_available_models(raw_request)
    if not (chats := _chats(raw_request)):
        return stock
    listed = (await raw_request.app.state.openai_serving_models.show_available_models()).model_dump()
    cards = [{**listed["data"][0], "id": name, "root": name, "owned_by": "mem_triton"} for name in chats]
    return JSONResponse({**listed, "data": [*listed["data"], *cards]})


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
    if (part := _chats(raw_request).get(request.model or "")) is None:
        return await create_chat_completion(request, raw_request)
    body = await raw_request.json()
    try:
        part.check(body)
    except RequestError as error:
        registry.count_refusal(error.field)
        said = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": 400}
        return JSONResponse({"error": said}, status_code=400)
    if request.stream:
        return StreamingResponse(_events(part, body), media_type="text/event-stream")
    return await _answer(part, raw_request, body)


@with_cancellation
async def _answer(part: ChatPart, raw_request: Request, body: Mapping[str, Any]) -> Response:
    status, said = await part.answer(body)
    return JSONResponse(said, status_code=status, headers={"Retry-After": "1"} if status == 429 else None)


async def _events(part: ChatPart, body: Mapping[str, Any]) -> AsyncIterator[str]:
    """The stream. The response that reads it listens for a client that leaves, and cancels it; that closes what it
    asks."""
    async with contextlib.aclosing(part.stream(body)) as events:
        async for event in events:
            yield event


def _chats(raw_request: Request) -> Mapping[str, ChatPart]:
    return getattr(raw_request.app.state, "mem_triton_chats", {})
