"""Captures without an engine: the front end's and a worker's real halves, and what runs between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mem_triton.ops.reposition import rope_from_config
from mem_triton.runtime.frontend.memory import Opened
from mem_triton.store.bank import Bank
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.base import Outcome
from mem_triton.systems.explicit.captures import Capture, Captures
from mem_triton.systems.explicit.chat import ChatFrame
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading
from mem_triton.systems.explicit.worker_captures import WorkerCaptures
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from tests.store.bank_case import DIM, LAYERS, block, spec
from tests.support.front import front_end

PROMPT = list(range(10, 18))
ROPE = rope_from_config({"model_type": "qwen3", "head_dim": DIM, "rope_theta": 10_000.0})


def make_bank(folder: Path) -> Path:
    Bank.create(folder, spec(kind="prefix", keep_tokens=None)).close()
    return folder


class Served:
    """A server of a bank of whole texts, with one worker. awaits: where its calls to the worker suspend."""

    def __init__(self, bank: Path, mode: str = "own", frame: ChatFrame | None = None) -> None:
        self.bank = Bank.open(bank)
        layout = SimpleNamespace(max_pages=8, page_tokens=16)
        self.captures = Captures(
            self.bank, layout, mode, 512, lambda ids: f"text {ids}", lambda: frame, logging.getLogger()
        )
        self.residency = Residency(8, 16, 1)
        explicit = object.__new__(ExplicitFrontEnd)
        explicit.captures, explicit.residency = self.captures, self.residency
        self.memory = front_end(explicit=explicit, call=self.call)
        self.worker = WorkerCaptures(dict.fromkeys(LAYERS, ROPE), 0, 0, self._context)
        self.read: list[list[int]] = []  # what engine requests have read
        self.awaits = 2

    def _context(self, request_id: str, layer: int, tokens: int) -> Any:
        kept = block(layer, tokens, layers=1, dense=True)
        return kept.keys[0], kept.values[0]

    async def call(self, method: str, *args: Any) -> list[Any]:
        for _ in range(self.awaits):
            await asyncio.sleep(0)
        if method == "drop_captures":
            return [self.worker.drop(*args)]
        assert method == "captured"
        answer = await asyncio.wrap_future(self.worker.outcome(*args))
        for _ in range(self.awaits):
            await asyncio.sleep(0)
        return [answer]

    def open(self, name: str = "note", **fields: Any) -> Opened:
        """A request that asks to be kept."""
        request = parse_request({"mem_capture": name, **fields}).systems["memory"]
        capture = self.captures.check(request, RequestParams())
        return Opened({"memory": Reading(request, capture=capture, reads_answer=True)})

    async def run_engine(self, ids: list[int], opened: Opened) -> None:
        """What an engine does with the request that reads what is kept."""
        self.read.append(ids)
        name = f"r{len(self.read)}"
        self.worker.enter(name, self.memory.payload(opened).systems["memory"].capture)
        await asyncio.sleep(0)
        self.worker.set_rows([name], [len(ids) - 1])
        await asyncio.sleep(0)
        self.worker.leave(name)

    async def end(self, opened: Opened, answer: Sequence[int] = (), normal: bool = True) -> None:
        await self.memory.end(opened, Outcome(normal, len(PROMPT), len(answer), PROMPT, list(answer)), self.run_engine)

    def capture(self, name: str = "note", answer: Sequence[int] = (), **fields: Any) -> Capture:
        """A request that is kept, from its fields to its end."""
        opened = self.open(name, **fields)
        asyncio.run(self.end(opened, answer))
        return opened.parts["memory"].capture

    def left(self) -> list[str]:
        """What captures have left behind."""
        files = [path.name for path in self.captures.folder.iterdir()]
        worker = self.worker
        return files + list(worker._files) + list(worker._requests) + list(self.captures._running)
