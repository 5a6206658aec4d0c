"""MemoryLLM's front-end part: which version a request reads, and who writes into which pool when.

A request keeps the version that it was admitted with. Versions lie in pages of the device, the least recently read ones
make room; a request waits for its version outside of the engine.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mem_triton import metrics
from mem_triton.schema import ConfigError
from mem_triton.store.pool.residency import Ticket
from mem_triton.systems.base import (
    Alive,
    Capability,
    FrontendPart,
    FrontendServices,
    Outcome,
    RequestMemory,
    Rpc,
)
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.injections import Injecting, Injections
from mem_triton.systems.memoryllm.layout import cache_key, layout_of, open_store
from mem_triton.systems.memoryllm.read_adapter import READ, unfit_adapter
from mem_triton.systems.memoryllm.records import PoolError, UnknownPoolError
from mem_triton.systems.memoryllm.request import PoolRequest
from mem_triton.systems.memoryllm.residents import Residents
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolVersion
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import PageRun, Segment, SystemPayload
from mem_triton.systems.request import RequestError


@dataclass(eq=False, kw_only=True)
class PoolReading(RequestMemory):
    """One request that reads a version. prompt: its tokens."""

    version: PoolVersion
    prompt: int = 0
    ticket: Ticket | None = None
    closed: bool = False
    waits: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def report(self) -> dict[str, Any]:
        return {"pool": {"id": self.version.id}}


class PoolFrontEnd(FrontendPart):
    """One per engine front end."""

    between_steps = frozenset({"place", "write", "write_on", "write_off"})

    def __init__(self, engine: EngineShape, section: MemoryLLMSection, services: FrontendServices) -> None:
        self.section, self.max_model_len = section, engine.max_model_len
        self._max_step_tokens = engine.max_step_tokens
        self.obstacle = services.obstacles.get(Capability.SEGMENTS)
        self.pools = open_store(engine, section)
        self.layout = layout_of(engine, section, self.pools.shape)
        self._key = cache_key(engine, self.pools)
        self._logger = logging.getLogger(f"{engine.engine.lower()}.mem_triton")
        self.residents = Residents(self.layout, section.layers_per_step or self.pools.shape.layers, self.pools.shape)
        self.injections = Injections(self.pools, section, engine, self.residents)
        self._default_is_gone = False
        self.check_default()
        self._logger.info("mem_triton.memoryllm: %s", self.layout.describe())

    def check_default(self) -> None:
        """Raise ConfigError if the default pool is not there."""
        if self.section.default is None:
            return
        try:
            version = self.pools.exact(self.section.default)
        except PoolError as error:
            raise ConfigError(f"mem_triton.memoryllm.default: {error}") from None
        if version.version == 0:
            self._logger.info("mem_triton.memoryllm.default: %s has no rows yet: requests read none", version.name)

    @property
    def concerns_all(self) -> bool:
        """Whether requests that say nothing read a pool."""
        return self.section.default is not None

    def check(self, request: PoolRequest) -> None:
        """Raises RequestError if the fields name what there is not."""
        if request.inject is not None:
            self.injections.check(request)
        else:
            self._version(request)

    def admit(self, request: PoolRequest, params: RequestParams) -> RequestMemory | None:
        """A read of the version that is the newest one now, or was named; or a write. Raises RequestError."""
        if request.inject is not None:
            if self.obstacle:
                raise RequestError("mem_inject", self.obstacle)
            return self.injections.admit(request, params)
        version = self._version(request)
        if version is None:
            return None
        reasons = [self.obstacle, params.unfit and f"{params.unfit} cannot read a pool"]
        reasons.append(unfit_adapter(self.pools.about.get(READ), params.lora))
        if reason := next(filter(None, reasons), None):
            raise RequestError("mem_pool", f'{reason}; with mem_pool "" the request reads none')
        return PoolReading(version=version)

    def _version(self, request: PoolRequest) -> PoolVersion | None:
        """What a request reads; None for nothing. Raises RequestError."""
        name = self.section.default if request.pool is None else request.pool
        if not name:
            return None
        try:
            version = self.pools.exact(name, request.tenant)
            if version.version:
                return version
            if request.pool is None:
                return None
            self.pools.resolve(name, request.tenant)  # says what is missing
        except PoolError as error:
            if request.pool is None and isinstance(error, UnknownPoolError):
                self._leave_out(error)
                return None
            raise RequestError("mem_pool", str(error)) from None
        return None

    def _leave_out(self, why: PoolError) -> None:
        """The default pool was deleted while the server runs: requests that name none are served without."""
        if not self._default_is_gone:
            self._default_is_gone = True
            metrics.DEFAULTS_LOST.inc()
            self._logger.warning("mem_triton.memoryllm.default: requests are served without a pool: %s", why)

    async def prepare(self, memory: RequestMemory, prompt_ids: Sequence[int], rpc: Rpc) -> None:
        """Claim the version's pages, or look at the text that is to be written. Raises RequestError."""
        if isinstance(memory, Injecting):
            self.injections.take(memory, prompt_ids)
        elif not memory.closed:
            memory.prompt = self._checked(len(prompt_ids))
            memory.ticket = self.residents.claim(memory.id, memory.version, reads=True)

    def _checked(self, prompt: int) -> int:
        """Tokens of a prompt that reads a pool. Raises RequestError for one of M+ that cannot go in one step."""
        long, most = self.pools.shape.long_term, self._max_step_tokens
        if long is not None and self.section.ltm.selection == "whole" and prompt > most:
            raise RequestError(
                "mem_pool",
                f"the prompt has {prompt} tokens, and max_num_batched_tokens is {most}: all of them choose what is "
                'read, in one step; shorten it, raise that, or configure "ltm": {"selection": "chunk"}',
            )
        return prompt

    async def ready(self, memory: RequestMemory, alive: Alive, rpc: Rpc) -> None:
        """Wait until the version's pages are filled. Raises MemoryLoadError."""
        if isinstance(memory, PoolReading) and memory.ticket is not None:
            await self.residents.wait(memory.ticket, rpc, alive)

    def cut(self, memory: RequestMemory, prompt_tokens: int, max_tokens: int | None) -> tuple[int, int]:
        """One piece, of as many tokens as the context has room for."""
        room = max(1, self.max_model_len - prompt_tokens)
        limit = room if max_tokens is None else min(room, max_tokens)
        return limit, limit

    async def finish(self, memory: RequestMemory, outcome: Outcome, rpc: Rpc) -> None:
        """Let the pages go, or write."""
        if isinstance(memory, Injecting):
            await self.injections.write(memory, rpc)
        else:
            self.close(memory)

    def close(self, memory: RequestMemory) -> None:
        if isinstance(memory, PoolReading):
            memory.closed = True
            self.residents.release(memory.id)

    def payload(self, memory: RequestMemory) -> SystemPayload | None:
        if not isinstance(memory, PoolReading):
            return None
        ticket = memory.ticket
        pages = {ref: PageRun(tuple(ticket.pages[ref]), tokens) for ref, tokens in ticket.tokens.items()}
        prompt = memory.prompt if len(pages) > 1 else 0
        return SystemPayload(self._key, segments=tuple(map(Segment, pages)), pages=pages, prompt=prompt)
