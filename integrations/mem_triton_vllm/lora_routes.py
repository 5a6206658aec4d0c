"""Lets the route that loads LoRA adapters answer HTTP 503 where the engine says that it may be tried again.

vLLM answers whatever a load raises with HTTP 500, and keeps its text alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import RetryableRequestError

_SAID: ContextVar[list[RetryableRequestError] | None] = ContextVar("mem_triton_lora_refusals", default=None)


def install() -> None:
    """Answer so in the servers that this process starts from now on."""
    stock = OpenAIServingModels.load_lora_adapter
    if not hasattr(stock, "_mem_triton"):
        OpenAIServingModels.load_lora_adapter = _answering(stock)


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
    """Tell the route, if one has called, what is raised within and may be tried again."""
    try:
        yield
    except RetryableRequestError as error:
        if (said := _SAID.get()) is not None:
            said.append(error)
        raise


def _answering(stock: Any) -> Any:
    @functools.wraps(stock)
    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _SAID.set(said := [])
        try:
            answer = await stock(self, *args, **kwargs)
        finally:
            _SAID.reset(token)
        return create_error_response(said[0]) if said else answer

    load_lora_adapter._mem_triton = True
    return load_lora_adapter
