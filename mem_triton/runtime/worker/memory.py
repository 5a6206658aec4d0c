"""A worker's memory of both kinds, engine-neutral: who enters the batch, who leaves, and how a step's rows stand.

No exception of ours passes: whatever raises costs the requests concerned their memory, which the front end hears of
(``runtime.incidents``), and the step goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mem_triton.runtime.incidents import IncidentLog
from mem_triton.systems.delta_mem.slots import StateSlots

if TYPE_CHECKING:
    from mem_triton.systems.explicit.worker import ExplicitMemory

Carried = Callable[[], Mapping[str, Any] | None]
"""Reads what the front end resolved for a request; None for a plain one."""


class BatchMemory:
    """slots: δ-mem's states. explicit: the pool of pages, its tables, loader and captures. None where not configured.

    incidents: where lost memory is reported.
    """

    def __init__(
        self, slots: StateSlots | None = None, explicit: ExplicitMemory | None = None,
        incidents: IncidentLog | None = None,
    ) -> None:  # fmt: skip
        self.slots, self.explicit = slots, explicit
        self.incidents = incidents or IncidentLog()
        self._step: list[str] = []  # requests of the step that runs, or ran last
        self._lost: set[str] = set()  # requests in the batch that go on without memory

    def enter(self, request_id: str, carried: Carried) -> None:
        """A request joins the batch; one that is there already, or has lost its memory, stays as it is."""
        if request_id in self._lost:
            return
        try:
            read = carried()
            for part in self._parts:
                part.enter(request_id, read)
        except Exception as error:
            self.lose([request_id], "enter", error)

    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch, finished or preempted; its KV blocks are still its own."""
        self._lost.discard(request_id)
        for part in self._parts:
            try:
                part.leave(request_id)
            except Exception as error:
                self.incidents.report([request_id], "leave", error)
                part.drop_request(request_id)  # its row and pages are free in any case

    def begin_step(self, request_ids: Sequence[str], first: Sequence[int], last: Sequence[int]) -> None:
        """The coming step's batch: per row, the positions of the first and the last token that it processes."""
        self._step = list(request_ids)
        faults = {}
        try:
            if self.slots is not None:
                self.slots.set_rows(request_ids, last)
            if self.explicit is not None:
                faults = self.explicit.set_rows(request_ids, first, last)
        except Exception as error:
            self.skip_step(request_ids, error)
        for request_id, error in faults.items():
            self.lose([request_id], "begin_step", error)

    def skip_step(self, request_ids: Sequence[str], error: BaseException) -> None:
        """The coming step's rows cannot be told: none of them has memory in it."""
        self._step = list(request_ids)
        for part in self._parts:
            part.forget_rows()
        self.lose(self._readers(request_ids), "begin_step", error)

    def lose_states(self, error: BaseException) -> None:
        """A layer's step over the states failed: whoever is in the batch may have been corrected wrongly."""
        self.lose(self._step, "delta", error)

    def lose_references(self, error: BaseException) -> None:
        """A layer's attention over memory failed: who reads memory in this step went without."""
        self.lose(self._readers(self._step), "attention", error)

    def _readers(self, request_ids: Iterable[str]) -> list[str]:
        """Those of the requests that have memory of their own."""
        return [id for id in request_ids if any(id in part for part in self._parts)]

    def lose(self, request_ids: Iterable[str], where: str, error: BaseException) -> None:
        """These requests go on without memory, and fail with the reason."""
        request_ids = list(request_ids)
        self.incidents.report(request_ids, where, error)
        self._lost |= set(request_ids)
        for request_id in request_ids:
            for part in self._parts:
                part.drop_request(request_id)

    @property
    def _parts(self) -> list[StateSlots | ExplicitMemory]:
        return [part for part in (self.slots, self.explicit) if part is not None]


def attend_or_lose(attend: Callable[..., Any], read: Mapping[str, Any], lose: Callable[[BaseException], None]) -> None:
    """One layer's attention with memory, or without it if that fails.

    attend: takes what ``LayerMemory.read`` gives, or nothing, and writes its output. lose: told of what was raised;
    rows without memory do not notice. Raises what attention without memory raises.
    """
    try:
        attend(**read)
    except Exception as error:
        if not read:
            raise
        attend()
        lose(error)
