"""Explicit memory's front-end part: what an engine awaits before, between and after the pieces of an answer.

A client may leave at any ``await``; what changes state shared with others runs in tasks that belong to no client
(``store.pool.loads``, ``runtime.frontend.memory``).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from mem_triton.store.pool.loads import PageLoads
from mem_triton.systems.base import Alive, Capability, FrontendPart, FrontendServices, Outcome, Rpc
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.captures import Capture
from mem_triton.systems.explicit.chat import chat_frame
from mem_triton.systems.explicit.plans import Reading, ReadingPlans
from mem_triton.systems.explicit.searches import Found, Searches
from mem_triton.systems.explicit.section import MemorySection

CAPTURE_SECONDS = 60.0
"""Seconds that an answer waits for its prompt's keys and values to be written, before the capture has failed."""


class ExplicitFrontEnd(ReadingPlans, FrontendPart):
    """Plans, and what they wait for; one per engine front end."""

    @classmethod
    def of(cls, engine: EngineShape, section: MemorySection, services: FrontendServices) -> ExplicitFrontEnd:
        """With an engine's services. Raises ConfigError for a bank or entries that cannot be served."""
        tokenizer = services.tokenizer
        frame = functools.cache(lambda: None if tokenizer is None else chat_frame(tokenizer()))
        obstacle = services.obstacles.get(Capability.SEGMENTS)
        return cls(engine, section, services.decode, obstacle, services.render, frame, tokenizer)

    _loads: PageLoads | None = None

    @functools.cached_property
    def searches(self) -> Searches:
        """Threads that search the bank."""
        return Searches()

    def start(self, rpc: Rpc) -> None:
        """Begin to fill the pages of default entries."""
        if not self.obstacle:
            self._page_loads(rpc).start()

    async def prepare(self, memory: Reading, prompt_ids: Sequence[int], rpc: Rpc) -> None:
        """Complete the plan and pin its pages. Raises RequestError if it never fits."""
        found = await self.searches.outcome(self.find, memory, prompt_ids) if memory.top_k else Found()
        self.attach(memory, prompt_ids, found)
        self.claim(memory)

    async def ready(self, memory: Reading, alive: Alive, rpc: Rpc) -> None:
        """Wait until every page that the request reads is filled; others go on meanwhile. Raises MemoryLoadError.

        alive: looked at now and then.
        """
        await self._page_loads(rpc).wait(lambda: memory.pending, alive)

    async def advance(self, memory: Reading, prompt_tokens: int, generated: Sequence[int], rpc: Rpc) -> None:
        """New references for what was just said, if there are any and they fit."""
        found = await self.searches.outcome(self.find_next, memory, prompt_tokens, generated)
        self.refresh(memory, len(generated), found)

    async def finish(self, memory: Reading, outcome: Outcome, rpc: Rpc) -> None:
        """Release the pages, and make an entry of what the request asked to keep."""
        self.release(memory)
        capture = memory.capture
        if capture is None or not outcome.normal or outcome.read is None:
            return
        try:
            ids = self.captures.tokens(capture, outcome.prompt_ids, outcome.answer)
            try:
                await outcome.read(ids, self.captures.payload(capture, ids))
                await asyncio.to_thread(self.captures.keep, capture, ids, await self._captured(capture, rpc))
            finally:
                with contextlib.suppress(Exception):  # workers that cannot be asked are gone
                    await rpc("drop_captures", [capture.lease])
        except Exception as error:
            self.captures.failed(capture, error)
        finally:
            self.captures.discard(capture)
            memory.failure = capture.error

    async def _captured(self, capture: Capture, rpc: Rpc) -> list[dict[str, Any]]:
        """Each rank's file of a kept prompt, or its error."""
        try:
            return await asyncio.wait_for(rpc("captured", capture.lease), CAPTURE_SECONDS)
        except TimeoutError:
            return [{"error": f"its keys and values were not written in {CAPTURE_SECONDS:.0f} s"}]

    def _page_loads(self, rpc: Rpc) -> PageLoads:
        if self._loads is None:  # one front end has one rpc
            self._loads = PageLoads(self.residency, rpc)
        return self._loads
