"""Serves chat models of memory systems by SGLang's own handler of chat requests, in a class of ours.

SGLang's tokenizer manager names the class of the handler, and subclasses of it may name another. What other routes are
asked about chat models is answered by ``runtime.frontend.chat_models``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request, Response
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from mem_triton.config import MemTritonConfig
from mem_triton.runtime.frontend import chat_models
from mem_triton.systems.base import ChatHost, ChatPart
from mem_triton_sglang.http_fields import FIELDS


class ServesChatModels(TokenizerManager):
    """Names the handler that serves chat models. chats: the chat models, by name."""

    chats: Mapping[str, ChatPart]

    def start_chats(self, config: MemTritonConfig) -> None:
        """Make the chat models that are configured. Raises ConfigError for a name that is taken."""
        names = [self.served_model_name, *self.lora_ref_cache]
        self.chats = chat_models.chat_models(config, ChatHost(self._ask, FIELDS), names)
        self.chat_handler: ChatWithModels | None = None

    @property
    def serving_chat_class(self) -> Any:
        return ChatWithModels if self.chats else super().serving_chat_class

    async def _ask(self, body: dict[str, Any], caller: Any) -> tuple[int, dict[str, Any]]:
        if self.chat_handler is None:
            return 503, {"error": {"message": "the server is starting"}}
        return await self.chat_handler.ask(body, caller)

    def adapter_of(self, model: str) -> str | None:
        """The LoRA adapter that a model's name means, "" for the base model, None for no model of this server.

        SGLang itself takes a name that it does not know for the base model's.
        """
        if model == self.served_model_name:
            return ""
        adapter = model.removeprefix(f"{self.served_model_name}:")
        return adapter if adapter in self.lora_ref_cache else None

    def adapters_by_name(self) -> dict[str, str]:
        """The adapters' names, as the server lists them, each with the one that SGLang's handlers understand."""
        served = self.served_model_name
        return {name: f"{served}:{name}" for name in self.lora_ref_cache if name != served}


class ChatWithModels(OpenAIServingChat):
    """Answers requests to chat models; those to other models are SGLang's, untouched.

    An adapter answers under the name that the server lists, too: SGLang takes that for the base model's.
    """

    def __init__(self, tokenizer_manager: ServesChatModels, template_manager: Any) -> None:
        super().__init__(tokenizer_manager, template_manager)
        self.manager = tokenizer_manager
        tokenizer_manager.chat_handler = self

    async def handle_request(self, request: Any, raw_request: Request) -> Any:
        part = self.manager.chats.get(request.model)
        if part is None:
            if (adapter := self.manager.adapters_by_name().get(request.model)) is not None:
                request = request.model_copy(update={"model": adapter})
            return await super().handle_request(request, raw_request)
        return await chat_models.respond(part, await raw_request.json(), request.stream, raw_request)

    async def ask(self, body: Mapping[str, Any], caller: Any) -> tuple[int, dict[str, Any]]:
        """Ask a model of this server. caller: the request for which it is asked; its headers say who speaks."""
        if (adapter := self.manager.adapter_of(model := body["model"])) is None:
            return 404, {"error": {"message": f"this server has no model {model!r}"}}
        rid = uuid.uuid4().hex
        try:
            request = ChatCompletionRequest(
                **{**body, "model": self.manager.served_model_name, "lora_path": adapter or None, "rid": rid}
            )
            answer = await super().handle_request(request, caller)
        except ValueError as error:  # fields that SGLang's own route answers with HTTP 400
            return 400, {"error": {"message": str(error)}}
        except BaseException:  # nobody waits for it: SGLang goes on with a request until it is told
            self.manager.abort_request(rid)
            raise
        if isinstance(answer, Response):
            return answer.status_code, orjson.loads(answer.body)
        return 200, answer.model_dump()
