"""Registers δ-mem as a memory system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mem_triton.schema import General
from mem_triton.systems.base import Capability, FrontendPart, FrontendServices, MemorySystem, WorkerHost, WorkerPart
from mem_triton.systems.delta_mem.request import FIELDS, SessionRequest, parse
from mem_triton.systems.delta_mem.section import DeltaSection
from mem_triton.systems.engine import EngineShape


class DeltaMem(MemorySystem):
    """Online state (arXiv 2605.12357)."""

    name, title, Config, fields = "delta", "δ-mem", DeltaSection, FIELDS
    requires = frozenset({Capability.STATE})

    def parse(self, fields: Mapping[str, Any], tenant: str) -> SessionRequest:
        return parse(fields, tenant)

    def frontend(self, config: General, engine: EngineShape, services: FrontendServices) -> FrontendPart:
        from mem_triton.systems.delta_mem.adapter import load_adapter
        from mem_triton.systems.delta_mem.frontend import SessionFrontEnd

        section = config.section(self.name)
        adapter = load_adapter(section.adapter, section.revision, section.scope)
        return SessionFrontEnd(engine, config, adapter, services.obstacles.get(Capability.STATE))

    def worker(self, config: General, engine: EngineShape, host: WorkerHost) -> WorkerPart:
        from mem_triton.systems.delta_mem.worker import DeltaWorker

        return DeltaWorker(config.section(self.name), engine, host)


SYSTEM = DeltaMem()
