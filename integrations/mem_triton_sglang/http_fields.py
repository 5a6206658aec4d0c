"""Refuses fields that SGLang's HTTP server would drop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mem_triton.runtime.frontend.chat_models import CHAT, Adapters, AnswerChatModels
from mem_triton.runtime.frontend.http_fields import FieldPlaces, RefuseMisplacedFields
from mem_triton.systems.base import ChatPart

FIELDS = "custom_params"
"""Where a request of OpenAI's API has memory's fields."""
PLACES = FieldPlaces(
    {
        "/generate": "sampling_params.custom_params",
        "/v1/completions": FIELDS,
        "/v1/chat/completions": FIELDS,
        "/invocations": FIELDS,
        "/vertex_generate": "parameters.sampling_params.custom_params",
    }
)
"""Where SGLang's routes take what reaches ``sampling_params["custom_params"]``."""


def install(chats: Mapping[str, ChatPart], adapters: Adapters) -> None:
    """Refuse such fields in this process's HTTP server, if it has one; ``Engine`` has none.

    chats: the server's chat models, which it lists, and which other routes than that of chats refuse.
    adapters: its LoRA adapters, whose plain names they refuse, too, where there are chat models.
    """
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None:
        return
    from starlette.middleware import Middleware

    async def listed() -> dict[str, Any]:
        return (await server.available_models()).model_dump()

    middleware = server.app.user_middleware
    if not any(one.cls is RefuseMisplacedFields for one in middleware):
        middleware.append(Middleware(RefuseMisplacedFields, places=PLACES))  # innermost: behind authentication
        served = (CHAT, "/invocations")  # one handler has both
        options = {"chats": lambda scope: chats, "listed": listed, "served": served, "adapters": adapters}
        middleware.append(Middleware(AnswerChatModels, **options))
