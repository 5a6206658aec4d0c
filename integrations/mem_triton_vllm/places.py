"""Keeps the turn of an answer in several engine requests: newcomers do not overtake it in vLLM's scheduler.

When a piece ends, its place in the batch and its KV blocks stay reserved for the next one, for as long as a search and
a load take; the next one goes to the front of the queue. So it is as if the request had never left.

Why a patch: vLLM's queue knows arrivals and priorities alone, and a place in the batch belongs to one engine request.
Its streaming inputs keep both between two inputs of one request, but not with other sampling parameters' memory, which
the runner is told of once. What is patched: one method of ``Scheduler``, in the engine-core process, which looks at
requests that are added; a scheduler that gets an answer in pieces has three more of its methods wrapped from then on.
"""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from mem_triton.systems.payload import Place, place_of
from mem_triton.systems.request import carried_by

logger = init_logger("vllm.mem_triton")

RESERVED_SECONDS = 2.0
"""How long a place is kept for a continuation that does not come: its client has left, or its search is stuck."""
_MARK = "_mem_triton"


@dataclass
class _Reserved:
    """The place of an answer between two pieces. ended: the piece that holds its KV blocks. until: on the clock."""

    ended: Request
    until: float


class Places:
    """The places of one scheduler; nothing of it raises, the scheduler goes on without."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._reserved = scheduler, dict[str, _Reserved]()
        self._free_blocks, self._schedule = scheduler._free_blocks, scheduler.schedule
        self._reset_prefix_cache = scheduler.reset_prefix_cache
        scheduler._free_blocks, scheduler.schedule = self.free_blocks, self.schedule
        scheduler.reset_prefix_cache = self.reset_prefix_cache

    def to_front(self, request: Any, place: Place) -> None:
        """A piece that continues an answer has been added to the queue."""
        waiting = self._scheduler.waiting
        waiting.remove_request(request)
        if place.answer in self._reserved:
            ended = self._reserved[place.answer].ended
            request.arrival_time = ended.arrival_time  # what a queue by priority goes by
            self._reserved[place.answer] = _Reserved(ended, 0.0)  # free for the first in line, from the next step on
        waiting.prepend_request(request)

    def free_blocks(self, request: Request) -> None:
        """Stands for ``Scheduler._free_blocks``: those of a piece with a successor stay until that comes."""
        place = _place(request)
        if place is None or not place.goes_on or request.status is not RequestStatus.FINISHED_LENGTH_CAPPED:
            self._free_blocks(request)
            return
        self._reserved[place.answer] = _Reserved(request, time.monotonic() + RESERVED_SECONDS)
        del self._scheduler.requests[request.request_id]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``Scheduler.schedule``: reserved places are not given away."""
        self.release()
        reserved = len(self._reserved)
        if not reserved:
            return self._schedule(*args, **kwargs)
        self._scheduler.max_num_active_reqs -= reserved
        try:
            return self._schedule(*args, **kwargs)
        finally:
            self._scheduler.max_num_active_reqs += reserved

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``Scheduler.reset_prefix_cache``, which does nothing while blocks are held."""
        self.release(time.monotonic() + 2 * RESERVED_SECONDS)
        return self._reset_prefix_cache(*args, **kwargs)

    def release(self, now: float | None = None) -> None:
        """Give up the places whose successor has come, or does not come any more."""
        now = time.monotonic() if now is None else now
        for answer in [answer for answer, reserved in self._reserved.items() if reserved.until <= now]:
            ended = self._reserved.pop(answer).ended
            try:
                self._scheduler._free_request_blocks(ended)
            except Exception as error:  # no engine ends with it
                logger.error("mem_triton: blocks of %s are not freed: %s", ended.request_id, error)


def install(undo: ExitStack) -> None:
    """Wrap vLLM's method; calling it again is harmless. ``undo`` puts it back."""
    stock = Scheduler.add_request
    if not hasattr(stock, _MARK):
        undo.callback(setattr, Scheduler, "add_request", stock)
        Scheduler.add_request = _with_places(stock)


def _with_places(stock: Any) -> Any:
    @functools.wraps(stock)
    def add_request(scheduler: Scheduler, request: Request) -> None:
        stock(scheduler, request)
        try:
            if (place := _place(request)) is not None:
                places = vars(scheduler).get(_MARK)
                if places is None:
                    places = Places(scheduler)
                    setattr(scheduler, _MARK, places)
                if place.continues:
                    places.to_front(request, place)
        except Exception as error:
            logger.error("mem_triton: the place of %s is not kept: %s", request.request_id, error)

    setattr(add_request, _MARK, True)
    return add_request


def _place(request: Request) -> Place | None:
    try:
        return place_of(carried_by(request.sampling_params))
    except Exception as error:  # no engine ends with it
        logger.error("mem_triton: the place of %s is not kept: %s", request.request_id, error)
        return None
