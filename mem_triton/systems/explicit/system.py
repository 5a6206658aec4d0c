"""Registers explicit memory as a memory system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mem_triton.schema import General
from mem_triton.systems.base import Capability, FrontendPart, FrontendServices, MemorySystem, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.request import FIELDS, ReadingRequest, parse
from mem_triton.systems.explicit.section import MemorySection


class Explicit(MemorySystem):
    """Keys and values that were written once: prefixes, parallel references, Memory³ (arXiv 2407.01178)."""

    name, title, Config, fields = "memory", "explicit memory", MemorySection, FIELDS
    requires = frozenset({Capability.SEGMENTS, Capability.CAPTURE})

    def parse(self, fields: Mapping[str, Any], tenant: str) -> ReadingRequest:
        return parse(fields, tenant)

    def frontend(self, config: General, engine: EngineShape, services: FrontendServices) -> FrontendPart:
        from mem_triton.systems.explicit.frontend import ExplicitFrontEnd

        return ExplicitFrontEnd.of(engine, config.section(self.name), services)

    def worker(self, config: General, engine: EngineShape, host: WorkerHost) -> WorkerPart:
        from mem_triton.systems.explicit.worker import ExplicitMemory

        return ExplicitMemory(engine, config.section(self.name), host)


SYSTEM = Explicit()
