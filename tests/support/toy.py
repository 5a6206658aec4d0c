"""A whole memory system of another distribution: a constant prefix of made-up keys and values, read on request."""

from __future__ import annotations

import torch

from mem_triton.ops.memory_attention import SharedSegment
from mem_triton.schema import Section
from mem_triton.store.pool.plan import FOREVER
from mem_triton.systems.base import Capability, FrontendPart, MemorySystem, RequestMemory, WorkerPart
from mem_triton.systems.payload import Segment, SystemPayload
from mem_triton.systems.request import flag


class ToySection(Section):
    """A constant prefix. tokens: its length."""

    tokens: int = 4


def prefix(heads: int, tokens: int, width: int) -> torch.Tensor:
    """Keys and values of every layer, [2, heads, tokens, width]; keys are placed as they are."""
    return torch.randn(2, heads, tokens, width, generator=torch.Generator().manual_seed(7))


class ToyFrontEnd(FrontendPart):
    def admit(self, fields, params):
        return RequestMemory() if fields else None

    def payload(self, memory):
        return SystemPayload(key="toy", segments=(Segment("toy@1"),))


class ToyWorker(WorkerPart):
    def __init__(self, section, engine, host):
        made = prefix(engine.kv_heads, section.tokens, engine.head_dim).to(host.device, engine.dtype)
        self.rows = torch.full((engine.max_requests,), -1, dtype=torch.int32, device=host.device)
        self.segment = SharedSegment(*made, self.rows * 0, self.rows * 0 + FOREVER)
        self.readers = set()
        self.leave = self.drop_request = self.readers.discard

    def __contains__(self, request_id):
        return request_id in self.readers

    def enter(self, request_id, payload):
        self.readers.add(request_id)

    def begin_step(self, step):
        rows = [-1 + (id in self.readers) for id in step.request_ids]
        self.rows.copy_(torch.tensor(rows + [-1] * (len(self.rows) - len(rows)), dtype=torch.int32))
        return {}

    def forget_rows(self):
        self.rows.fill_(-1)

    def segments(self, layer):
        return self

    def read(self, rows):
        return {"row_slot": self.rows[:rows], "shared": self.segment}


class Toy(MemorySystem):
    name, title, Config, fields = "toy", "a toy", ToySection, {"mem_toy": "1: reads the constant prefix"}
    requires = frozenset({Capability.SEGMENTS})

    def parse(self, fields, tenant):
        return flag(fields, "mem_toy", False)

    def frontend(self, config, engine, services):
        return ToyFrontEnd()

    def worker(self, config, engine, host):
        return ToyWorker(config.toy, engine, host)


SYSTEM = Toy()
