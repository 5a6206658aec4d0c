"""Registers MeMo as a memory system: a chat model of the server's, without a part in its workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mem_triton.schema import General
from mem_triton.systems.base import (
    Capability,
    ChatHost,
    ChatPart,
    FrontendPart,
    FrontendServices,
    MemorySystem,
    RequestMemory,
    WorkerHost,
)
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memo.section import TRACE, MemoSection
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError, flag


class Memo(MemorySystem):
    """A memory model beside the served one (arXiv 2605.15156)."""

    name, title, Config = "memo", "MeMo", MemoSection
    fields = {TRACE: "1: an answer of the model with a memory model says what was asked and replied"}  # noqa: RUF012
    requires = frozenset({Capability.CHAT})

    def parse(self, fields: Mapping[str, Any], tenant: str) -> bool:
        return flag(fields, TRACE, False)

    def frontend(self, config: General, engine: EngineShape, services: FrontendServices) -> FrontendPart:
        return MemoFrontEnd(config.section(self.name).name)

    def worker(self, config: General, engine: EngineShape, host: WorkerHost) -> None:
        return None

    def chat(self, config: General, host: ChatHost) -> ChatPart:
        from mem_triton.systems.memo.chat import MemoChat

        return MemoChat(config.section(self.name), host)


class MemoFrontEnd(FrontendPart):
    """Requests to the engine itself have nothing of it. model: the name under which both models are served."""

    def __init__(self, model: str) -> None:
        self.model = model

    def admit(self, fields: Any, params: RequestParams) -> RequestMemory | None:
        if fields:
            raise RequestError(TRACE, f"belongs to chat requests to the model {self.model!r}")
        return None


SYSTEM = Memo()
