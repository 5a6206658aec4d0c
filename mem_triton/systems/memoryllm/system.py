"""Registers MemoryLLM as a memory system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mem_triton.schema import General
from mem_triton.systems.base import Capability, FrontendPart, FrontendServices, MemorySystem, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.request import FIELDS, PoolRequest, parse
from mem_triton.systems.memoryllm.section import MemoryLLMSection


class MemoryLLM(MemorySystem):
    """Pools of hidden rows in every layer, written and read while the server runs (arXiv 2402.04624)."""

    name, title, Config, fields = "memoryllm", "MemoryLLM", MemoryLLMSection, FIELDS
    requires = frozenset({Capability.SEGMENTS, Capability.LAYER_IO})

    def parse(self, fields: Mapping[str, Any], tenant: str) -> PoolRequest:
        return parse(fields, tenant)

    def frontend(self, config: General, engine: EngineShape, services: FrontendServices) -> FrontendPart:
        from mem_triton.systems.memoryllm.frontend import PoolFrontEnd

        return PoolFrontEnd(engine, config.section(self.name), services)

    def worker(self, config: General, engine: EngineShape, host: WorkerHost) -> WorkerPart:
        from mem_triton.systems.memoryllm.worker import PoolWorker

        return PoolWorker(engine, config.section(self.name), host)


SYSTEM = MemoryLLM()
