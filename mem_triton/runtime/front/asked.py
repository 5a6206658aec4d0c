"""What an engine's own parameters of a request say, as far as its memory has to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """answers: how many the request wants (``n``). lora: it is answered through a LoRA adapter.

    unfit: the kind of request that memory cannot serve, "streaming inputs" for example, None for plain tokens.
    fixed: why its references cannot change while it answers, None if they can. prompt_tokens: of its prompt, None if
    that is text still.
    """

    answers: int = 1
    lora: bool = False
    unfit: str | None = None
    fixed: str | None = None
    prompt_tokens: int | None = None
