"""Holds the part of an engine's own request parameters that memory depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mem_triton.systems.lora import Adapter


@dataclass(frozen=True)
class RequestParams:
    """answers: how many the request wants (``n``). lora: the LoRA adapter that answers it, None for none.

    unfit: the kind of request that memory cannot serve, "streaming inputs" for example, None for plain tokens.
    fixed: why its references cannot change while it answers, None if they can. prompt_tokens: of its prompt, None if
    that is text still. headers: of the HTTP request that it came with, by which it is known whom it speaks for; None if
    Python code sends it. chat: its prompt is known to be a chat. stops: it has stop strings.
    """

    answers: int = 1
    lora: Adapter | None = None
    unfit: str | None = None
    fixed: str | None = None
    prompt_tokens: int | None = None
    headers: Mapping[str, str] | None = None
    chat: bool = False
    stops: bool = False
