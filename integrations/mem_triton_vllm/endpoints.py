"""Serves chat models of memory systems, by routes beside vLLM's own.

An endpoint plugin by vLLM's contract (``vllm/plugins/endpoint_plugins/interface.py``): a route of the same path and
method takes the stock one's place. Requests for other models go to the stock handler as they came.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.logger import init_logger
from vllm.platforms import current_platform

from mem_triton.config import parse_config
from mem_triton.runtime.frontend import chat_models
from mem_triton.systems.base import ChatHost
from mem_triton_vllm.http_fields import XARGS, chats_of

logger = init_logger("vllm.mem_triton")


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
        names = {model.name for model in state.openai_serving_models.base_model_paths}
        names |= set(state.openai_serving_models.lora_requests)
        seeds = not current_platform.is_cpu()
        host = ChatHost(_served(state, seeds), XARGS)
        state.mem_triton_chats |= chat_models.chat_models(parse_config(section), host, names)
        if state.mem_triton_chats and not seeds:
            logger.warning("Chat models sample without their seeds, which would end vLLM on a CPU")


def _served(state: Any, seeds: bool) -> Any:
    """Asks a model of this server, in this process, with the server's own limits and adapters.

    seeds: whether calls keep theirs. On a CPU a seeded request that is sampled ends vLLM's engine when its prompt is
    read in parts (``GPUModelRunner._bookkeeping_sync`` sets back a generator's offset, which a CPU's has not).
    """

    async def served(body: dict[str, Any], caller: Any) -> tuple[int, dict[str, Any]]:
        if not seeds:
            body = {name: value for name, value in body.items() if name != "seed"}
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
    if not (chats := chats_of(raw_request.scope)):
        return stock
    listed = (await raw_request.app.state.openai_serving_models.show_available_models()).model_dump()
    return JSONResponse(chat_models.with_chats(listed, chats))


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
    if (part := chats_of(raw_request.scope).get(request.model or "")) is None:
        return await create_chat_completion(request, raw_request)
    return await chat_models.respond(part, await raw_request.json(), bool(request.stream), raw_request)
