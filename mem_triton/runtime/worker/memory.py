"""Keeps a worker's memory of all systems: who enters the batch, who leaves, and how a step's rows stand.

No exception of ours passes: whatever raises costs the requests concerned their memory, which the front end hears of
(``runtime.incidents``), and the step goes on. The front end's calls come in threads of their own (``service``); a lock
keeps them out while a step's tables are written.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mem_triton.config import MemTritonConfig
from mem_triton.runtime.incidents import IncidentLog
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, LayerSegments, StepBatch, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.payload import decode

Carried = Callable[[], bytes | None]
"""Reads the encoded payload that came with a request; None for a plain one."""


def locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``BatchMemory`` during which no call of the front end touches what steps read."""

    @functools.wraps(method)
    def under_lock(self: BatchMemory, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return under_lock


class BatchMemory:
    """What a worker has. parts: by system; see ``attach``. incidents: where lost memory is reported.

    reading: a flag for each row of the coming step, whether attention reads more than its context; () if none does.
    lock: between the thread that runs the steps and those of the front end's calls. on_stream: the context in which
    work joins the steps' stream.
    """

    def __init__(self, parts: Mapping[str, WorkerPart] | None = None, incidents: IncidentLog | None = None) -> None:
        self.parts: dict[str, WorkerPart] = dict(parts or {})
        self.incidents = incidents or IncidentLog()
        self.reading: Sequence[bool] = ()
        self._readers_of_segments: list[WorkerPart] = []
        self.lock = threading.RLock()
        self.on_stream: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._step: list[str] = []  # requests of the step that runs, or ran last
        self._inside: set[str] = set()  # requests in the batch that have entered

    def attach(self, config: MemTritonConfig, engine: EngineShape, host: WorkerHost) -> None:
        """Make the configured systems' parts. Raises ConfigError naming what does not fit, or what the engine lacks."""
        registry.check_capabilities(config.systems, host.capabilities, engine.engine)
        for name in config.systems:
            if (part := registry.systems()[name].worker(config, engine, host)) is not None:
                self.parts[name] = part
        self._readers_of_segments = [
            part for name, part in self.parts.items() if Capability.SEGMENTS in registry.required([name])
        ]

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """No step begins inside, and what is queued joins their stream."""
        with self.lock, self.on_stream():
            yield

    def call(self, system: str, method: str, *args: Any) -> Any:
        """Answer a front end's call. Raises LookupError for a system or method that there is not."""
        part = self.parts.get(system)
        if part is None or method not in part.calls:
            known = ", ".join(f"{name}.{call}" for name, one in self.parts.items() for call in sorted(one.calls))
            raise LookupError(f"{system}.{method} is unknown; known are {known}")
        return part.calls[method](*args)

    def is_inside(self, request_id: str) -> bool:
        """Whether ``enter`` has nothing to do for a request."""
        return request_id in self._inside

    @locked
    def enter(self, request_id: str, carried: Carried) -> None:
        """A request joins the batch; one that is there already, with its memory or without, stays as it is.

        Some runners say it at every step, so only the first time costs anything.
        """
        if request_id in self._inside:
            return
        self._inside.add(request_id)
        try:
            data = carried()
            for name, payload in decode(data).systems.items() if data is not None else ():
                self.parts[name].enter(request_id, payload)
        except Exception as error:
            self.lose([request_id], "enter", error)

    @locked
    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch, finished or preempted; its KV blocks are still its own."""
        self._inside.discard(request_id)
        for part in self.parts.values():
            try:
                part.leave(request_id)
            except Exception as error:
                self.incidents.report([request_id], "leave", error)
                self._drop(part, request_id)  # its row and pages are free in any case

    @locked
    def begin_step(self, request_ids: Sequence[str], first: Sequence[int], last: Sequence[int]) -> None:
        """The coming step's batch: per row, the positions of the first and the last token that it processes."""
        self._step = list(request_ids)
        step, faults = StepBatch(request_ids, first, last), {}
        try:
            for part in self.parts.values():
                faults |= part.begin_step(step)
        except Exception as error:
            self.skip_step(request_ids, error)
        for request_id, error in faults.items():
            self.lose([request_id], "begin_step", error)
        self.reading = self._reading(request_ids)

    @locked
    def skip_step(self, request_ids: Sequence[str], error: BaseException) -> None:
        """Run the coming step without memory, since its rows cannot be assigned to requests."""
        self._step, self.reading = list(request_ids), ()
        lost = self._readers(request_ids)
        for part in self.parts.values():
            try:
                part.forget_rows()
            except Exception as failure:  # rows of the step before may be read by anybody
                error, lost = failure, request_ids
        self.lose(lost, "begin_step", error)

    @locked
    def lose_step(self, error: BaseException, everybody: bool) -> None:
        """A layer failed with memory. everybody: whoever is in the batch may have been computed wrongly; else those
        that have memory of their own went without."""
        where = "state" if everybody else "attention"
        self.lose(self._step if everybody else self._readers(self._step), where, error)

    def segments(self, layer: int) -> LayerSegments | None:
        """Return what an attention layer reads besides its context, by its index in the model; None if nothing."""
        found = (part.segments(layer) for part in self.parts.values())
        return next((segments for segments in found if segments is not None), None)

    def describe(self) -> str:
        """Describe the memory in one line, for the log."""
        return "; ".join(part.describe() for part in self.parts.values())

    def _reading(self, request_ids: Sequence[str]) -> Sequence[bool]:
        flags: list[bool] = []
        for part in self._readers_of_segments:
            here = [id in part for id in request_ids]
            flags = [a or b for a, b in zip(flags, here, strict=True)] if flags else here
        return flags if any(flags) else ()

    def _readers(self, request_ids: Iterable[str]) -> list[str]:
        """Those of the requests that have memory of their own."""
        return [id for id in request_ids if any(id in part for part in self.parts.values())]

    def lose(self, request_ids: Iterable[str], where: str, error: BaseException) -> None:
        """These requests go on without memory, and fail with the reason."""
        request_ids = list(request_ids)
        self.incidents.report(request_ids, where, error)
        self._inside |= set(request_ids)
        for request_id in request_ids:
            for part in self.parts.values():
                self._drop(part, request_id)

    def _drop(self, part: WorkerPart, request_id: str) -> None:
        try:
            part.drop_request(request_id)
        except Exception as error:
            self.incidents.report([request_id], "drop", error)


def attend_or_lose(
    attend: Callable[[], Any], otherwise: Callable[[], Any], lose: Callable[[BaseException], None]
) -> None:
    """One layer's attention with memory, or without it if that fails.

    attend: writes its output. otherwise: writes it as if nobody had memory. lose: told of what was raised; rows without
    memory do not notice.
    """
    try:
        attend()
    except Exception as error:
        otherwise()
        lose(error)
