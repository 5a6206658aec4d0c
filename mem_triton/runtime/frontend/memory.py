"""Requests with memory in the process that takes an engine's requests, whatever memory systems are configured.

Each system's part (``systems.base.FrontendPart``) is asked in turn. What a worker needs travels with the request
(``payload``); what a KV cache needs to tell memories apart becomes part of its keys (``payload`` and ``identity``).

A client may leave at any ``await``: what has to come to its end runs in tasks that belong to no client.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mem_triton.config import MemTritonConfig
from mem_triton.runtime.frontend.gate import Gate
from mem_triton.runtime.frontend.tenants import Tenants
from mem_triton.runtime.incidents import Incidents
from mem_triton.systems import registry
from mem_triton.systems.base import Alive, Failure, FrontendPart, FrontendServices, Outcome, RequestMemory
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import Place, RequestPayload, SystemPayload
from mem_triton.systems.request import MemoryRequest, RequestError

logger = logging.getLogger(__name__)

Call = Callable[..., Awaitable[list[Any]]]
"""call(system, method, *args) -> one answer a worker."""
ReadText = Callable[[list[int], "Opened"], Awaitable[None]]
"""Runs an engine request of these tokens and this memory to its end."""


class MemoryLostError(RuntimeError):
    """A worker lost the memory of a request while it ran; its answer is not what was asked for and is withheld."""


async def always() -> None:
    """Ends no wait."""


@dataclass(eq=False)
class Opened:
    """One request's memory. parts: by system; systems in which it has none are absent.

    more: payloads of systems in which it only does what another request needs. ending: the task that sees to its
    end, and closes it; None where there is none (any more). carried: the engine may have it, and run it.
    """

    parts: dict[str, RequestMemory] = field(default_factory=dict)
    more: Mapping[str, SystemPayload] = field(default_factory=dict)
    ending: asyncio.Task[None] | None = None
    carried: bool = False

    @property
    def waits(self) -> bool:
        """Whether it has to be prepared before it runs."""
        return any(part.waits for part in self.parts.values())

    @property
    def finishes(self) -> bool:
        """Whether its end has to be seen to."""
        return any(part.waits or part.finishes for part in self.parts.values())

    @property
    def unscheduled(self) -> bool:
        """Whether the engine does not run it, and its answer has no tokens."""
        return any(part.unscheduled for part in self.parts.values())

    @property
    def reads_answer(self) -> bool:
        """Whether the answer's tokens are wanted at its end."""
        return any(part.reads_answer for part in self.parts.values())

    @property
    def dropped(self) -> int:
        """Tokens at the prompt's start that the engine does not read, because its memory has them."""
        return max((part.dropped for part in self.parts.values()), default=0)

    @property
    def failure(self) -> Failure | None:
        """Why something that it asked for besides its answer was not done."""
        return next((part.failure for part in self.parts.values() if part.failure is not None), None)

    def report(self) -> dict[str, Any] | None:
        """What the answer says of its memory; None if there is nothing to say."""
        report: dict[str, Any] = {}
        for part in self.parts.values():
            report |= part.report()
        if warnings := [warning for part in self.parts.values() for warning in part.warnings]:
            report["warnings"] = warnings
        return report or None


class MemoryFrontEnd:
    """Opens and closes the memory of each request; one per engine front end.

    parts: by system, in the registry's order. call: reaches the workers; set once the engine runs. barrier: returns
    when the workers have begun every step that the engine planned before; None where an engine has no such call.
    between_steps: as ``call``, of all workers between the same two steps; None likewise. gate: shut while the engine
    sleeps.

    Example::

        opened = memory.open(fields, RequestParams(answers=1))        # RequestError: answer it with HTTP 400
        await memory.prepare(opened, prompt_ids)
        await memory.ready(opened)
        payload = memory.payload(opened)
        ...
        await memory.end(opened, outcome)
        memory.close(opened)
    """

    def __init__(
        self,
        parts: Mapping[str, FrontendPart],
        tenants: Tenants | None = None,
        incidents: Incidents | None = None,
        call: Call | None = None,
    ) -> None:
        self.parts, self.tenants, self.incidents = dict(parts), tenants or Tenants(None), incidents
        self.call = call
        self.barrier: Callable[[], Awaitable[Any]] | None = None
        self.between_steps: Call | None = None
        self.gate = Gate()
        self._rpc = {name: functools.partial(self._call, name) for name in self.parts}
        self._owned: set[asyncio.Task[Any]] = set()

    @classmethod
    def of(
        cls, config: MemTritonConfig, engine: EngineShape, services: FrontendServices, **more: Any
    ) -> MemoryFrontEnd:
        """What is configured, before the engine starts. Raises ConfigError naming what cannot work."""
        systems = registry.systems()
        parts = {name: systems[name].frontend(config, engine, services) for name in config.systems}
        return cls(parts, Tenants(config.tenants), **more)

    async def _call(self, system: str, method: str, *args: Any) -> list[Any]:
        ordered = method in self.parts[system].between_steps
        return await self.gate.through(self.between_steps if ordered else self.call, system, method, *args)

    @property
    def concerns_all(self) -> bool:
        """Whether requests that say nothing have memory, too."""
        return any(part.concerns_all for part in self.parts.values())

    # Before anything runs.

    def open(self, fields: Mapping[str, Any] | None, params: RequestParams) -> Opened:
        """Check a request's fields. Raises RequestError naming the field and the fix, with nothing scheduled."""
        request = self._parse(fields, params.headers)
        opened = Opened()
        try:
            for name in reversed(self.parts):  # states last: a lease keeps others out
                if (memory := self.parts[name].admit(request.systems[name], params)) is not None:
                    opened.parts[name] = memory
        except BaseException:
            self.close(opened)
            raise
        opened.parts = {name: opened.parts[name] for name in self.parts if name in opened.parts}
        return opened

    def check_fields(self, fields: Mapping[str, Any], headers: Mapping[str, str] | None) -> None:
        """Raise the RequestError that ``open`` would because of the fields alone; opens nothing."""
        request = self._parse(fields, headers)
        for name, part in self.parts.items():
            part.check(request.systems[name])

    def _parse(self, fields: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> MemoryRequest:
        request = registry.parse_request(fields, lambda named: self.tenants.bind(named, headers))
        for name, system in registry.systems().items():  # fields of what is not configured are refused, not ignored
            said = next((field for field in system.fields if field in (fields or {})), None)
            if name not in self.parts and said is not None:
                raise RequestError(said, f"this server is configured without mem_triton.{name}, which serves the field")
        return request

    def begin(self, request_id: str) -> None:
        """A request of this name begins: what befell an earlier one of the same name is not its own."""
        if self.incidents is not None:
            self.incidents.forget(request_id)

    def start(self) -> None:
        """Begin what every request would wait for; the engine runs, and an event loop."""
        for name, part in self.parts.items():
            part.start(self._rpc[name])

    async def prepare(self, opened: Opened, prompt_ids: Sequence[int]) -> None:
        """Find and claim what the request reads. Raises RequestError if it never fits."""
        for name, memory in opened.parts.items():
            await self.parts[name].prepare(memory, prompt_ids, self._rpc[name])

    async def ready(self, opened: Opened, alive: Alive = always) -> None:
        """Wait until the request can run; alive: looked at in every round. Raises MemoryLoadError."""
        for name, memory in opened.parts.items():
            await self.parts[name].ready(memory, alive, self._rpc[name])

    def cut(self, opened: Opened, prompt_tokens: int, max_tokens: int | None) -> tuple[int, int] | None:
        """(tokens of each engine request that serves the answer, tokens of the whole answer); None for one request.

        max_tokens: what the request allows, None if as many as fit.
        """
        cuts = [self.parts[name].cut(memory, prompt_tokens, max_tokens) for name, memory in opened.parts.items()]
        cuts = [cut for cut in cuts if cut is not None]
        return (min(every for every, _ in cuts), min(limit for _, limit in cuts)) if cuts else None

    async def advance(self, opened: Opened, prompt_tokens: int, generated: Sequence[int]) -> None:
        """Change what the coming tokens read, at a cut of the answer."""
        for name, memory in opened.parts.items():
            await self.parts[name].advance(memory, prompt_tokens, generated, self._rpc[name])

    # What travels.

    def payload(self, opened: Opened, place: Place | None = None) -> RequestPayload | None:
        """What the workers and the prefix keys need of a request that is ready; None for a plain one.

        place: of an answer in several pieces.
        """
        parts = {name: self.parts[name].payload(memory) for name, memory in opened.parts.items()} | dict(opened.more)
        parts = {name: self._salted_part(part) for name, part in parts.items() if part is not None}
        return RequestPayload(parts, place=place) if parts or place is not None else None

    def identity(self, opened: Opened, among: Collection[str] | None = None) -> str | None:
        """Return what separates the request's tokens from those of others in a KV cache; None for the engine's own.

        among: the systems of the request's payload, where an engine takes requests that carry nothing past this front
        end, and shares with them what only plain parts depend on; None: all systems.
        """
        keys = [
            self.parts[name].identity(memory, bool(self._salt))
            for name, memory in opened.parts.items()
            if among is None or name in among or self._salt
        ]
        keys = [key for key in keys if key is not None]
        return self._salted("|".join(keys)) if keys else None

    @property
    def is_salted(self) -> bool:
        """Whether plain requests have to be kept from what was cached before an incident, too."""
        return bool(self._salt) and any(part.corrects_plain for part in self.parts.values())

    @property
    def _salt(self) -> int:
        """Above 0 after an incident: nothing that was cached before is found again, some of it lacks its memory."""
        return self.incidents.epoch if self.incidents is not None else 0

    def _salted(self, key: str) -> str:
        return f"{key}|{self._salt}" if self._salt else key

    def _salted_part(self, part: SystemPayload) -> SystemPayload:
        return msgspec.structs.replace(part, key=self._salted(part.key)) if part.key else part

    # While it runs, and after its answer.

    def check(self, request_id: str, final: bool = False) -> None:
        """Raise MemoryLostError if a worker lost the request's memory. final: its answer is about to be handed out."""
        if self.incidents is not None and (reason := self.incidents.of(request_id, final)):
            self.incidents.forget(request_id)
            raise MemoryLostError(f"the engine lost the memory of this request ({reason}); please try again")

    async def end(self, opened: Opened, outcome: Outcome, read: ReadText | None = None) -> None:
        """Commit, keep and release what a request leaves, and close it; it is over when this returns.

        A caller who leaves meanwhile changes nothing of it. The answer is whole by now: what cannot be committed or
        kept is a warning in ``opened.report()``, or its ``failure``. read: for outcomes whose answer is to be kept.
        """
        task = self._own(self._end(opened, outcome, read), opened)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                task.add_done_callback(_report_late)
            raise

    async def _end(self, opened: Opened, outcome: Outcome, read: ReadText | None) -> None:
        for name, memory in opened.parts.items():
            reading = functools.partial(self._read, name, read) if read is not None else None
            mine = dataclasses.replace(outcome, read=reading)
            await self.parts[name].finish(memory, mine, self._rpc[name])

    def _own(self, ending: Coroutine[Any, Any, None], opened: Opened) -> asyncio.Task[None]:
        """Run the end of a request as a task that its client cannot cancel."""
        opened.ending = task = asyncio.create_task(ending)
        self._owned.add(task)
        task.add_done_callback(lambda _: self._ended(task, opened))
        return task

    def abandon(self, opened: Opened) -> None:
        """Close a request that was taken from the engine before its end.

        Its pages are somebody else's only when no worker can begin a step with it any more: an abort and what workers
        are told go different ways.
        """
        if opened.ending is None and opened.carried and opened.waits and self.barrier is not None:
            with contextlib.suppress(RuntimeError):  # no loop runs any more
                asyncio.get_running_loop()
                self._own(self._left(), opened)
        self.close(opened)

    async def _left(self) -> None:
        with contextlib.suppress(Exception):  # workers that cannot be asked are gone
            await self.barrier()

    def _ended(self, task: asyncio.Task[None], opened: Opened) -> None:
        self._owned.discard(task)
        opened.ending = None
        self.close(opened)

    async def _read(self, name: str, read: ReadText, ids: list[int], payload: SystemPayload) -> None:
        """An engine request for one system's sake, in which the others take no part."""
        reading = {other: part.admit_reading() for other, part in self.parts.items() if other != name}
        opened = Opened({other: memory for other, memory in reading.items() if memory is not None}, {name: payload})
        try:
            await read(ids, opened)
        finally:
            self.close(opened)

    def close(self, opened: Opened) -> None:
        """End a request, however it came to its end; harmless when it has ended already, and while a task ends it."""
        if opened.ending is not None:
            return
        for name, memory in opened.parts.items():
            self.parts[name].close(memory)


def _report_late(task: asyncio.Task[None]) -> None:
    """An ending whose caller has left is over."""
    if not task.cancelled() and task.exception() is not None:
        logger.error("memory of a request whose client had left: %s", task.exception())
