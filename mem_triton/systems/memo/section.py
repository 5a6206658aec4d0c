"""The section ``memo`` of the configuration."""

from __future__ import annotations

from pydantic import Field

from mem_triton.systems.memo.protocol.settings import Settings

TRACE = "mem_memo_trace"
"""Request field with which an answer has its trace."""


class MemoSection(Settings):
    """MeMo: a memory model beside another model, served under one name.

    memory: the memory model, a model name of this server (a LoRA adapter's, too), or URL#MODEL.
    executive: the model that asks it and answers, likewise.
    name: under which both are served together.
    at_once: answers that are worked on at the same time.
    waiting: answers that may wait for their turn; more are refused with HTTP 429.
    """

    memory: str = Field(min_length=1)
    executive: str = Field(min_length=1)
    name: str = Field(min_length=1, max_length=200)
    at_once: int = Field(default=16, ge=1)
    waiting: int = Field(default=64, ge=0)
