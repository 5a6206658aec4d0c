"""Keeps the turn of an answer in several engine requests: newcomers do not overtake it in SGLang's scheduler.

When a piece ends, its place in the batch stays reserved for the next one for a number of the scheduler's passes; the
next one goes to the front of the queue, whatever the policy says of the others. Its prefix was used last, so that a
radix cache evicts it last. Ranks that split a model plan the same steps from the same requests, so nothing here looks
at a clock.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_LENGTH

from mem_triton.systems.payload import Place, place_of
from mem_triton_sglang.carrier import carried_of
from mem_triton_sglang.held import memory_of

logger = logging.getLogger("sglang.mem_triton")

RESERVED_PASSES = 256
"""Passes of the scheduler, one a step or more, for which a place is kept for a piece that does not come."""
_PLACES: weakref.WeakKeyDictionary[Any, Place] = weakref.WeakKeyDictionary()
"""SGLang's requests that are pieces of an answer."""


class Places:
    """Reserved places of one scheduler. shut: the batch was called full because of them."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}  # answer -> passes for which its place is kept
        self.shut = False

    def __len__(self) -> int:
        return len(self._left)

    def ended(self, request: Any) -> None:
        """A request leaves the batch for good, or is retracted."""
        place = _PLACES.get(request)
        if place is not None and place.goes_on and isinstance(request.finished_reason, FINISH_LENGTH):
            self._left[place.answer] = RESERVED_PASSES

    def begin_pass(self, waiting: list[Any]) -> None:
        """The scheduler looks whom of the ``waiting`` it takes."""
        came = {place.answer for request in waiting if (place := _PLACES.get(request)) is not None and place.continues}
        self._left = {answer: left - 1 for answer, left in self._left.items() if left > 1 and answer not in came}


# Hooks: called by SGLang's HookRegistry. What has no memory, or no answer in pieces, is left as it is.


def _harmless(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that leaves things as they are where it fails; the first failure is logged."""

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:  # no engine ends with it
            if hook.__name__ not in _FAILED:
                _FAILED.add(hook.__name__)
                logger.exception("mem_triton: places of answers in pieces are not kept")
            return None

    return guarded


_FAILED: set[str] = set()


def note(request: Any) -> None:
    """A request is made; it may be a piece of an answer."""
    try:
        if (place := place_of(carried_of(request.sampling_params))) is not None:
            _PLACES[request] = place
    except Exception as error:  # a payload that cannot be read: its memory is lost where it enters
        logger.warning("mem_triton: the place of %s is not kept: %s", request.rid, error)


def _of(scheduler: Any) -> Places | None:
    return getattr(memory_of(scheduler.req_to_token_pool), "places", None)


@_harmless
def before_pass(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """``Scheduler._get_new_batch_prefill_raw``: newcomers are taken into the batch."""
    places = _of(scheduler)
    if places is None or not (len(places) or places.shut):
        return
    places.begin_pass(scheduler.waiting_queue)
    if places.shut and (batch := kwargs.get("running_batch")) is not None:
        places.shut = False  # full for the newcomers of that pass; nobody else would look again
        batch.batch_is_full = False


@_harmless
def after_room(result: int, scheduler: Any, *args: Any, **kwargs: Any) -> int:
    """``Scheduler.get_num_allocatable_reqs``: how many more requests the batch takes."""
    places = _of(scheduler)
    if places is None or not len(places):
        return result
    room = result - len(places)
    places.shut = places.shut or room <= 0
    return max(room, 0)


@_harmless
def after_priority(result: None, policy: Any, waiting: list[Any], *args: Any, **kwargs: Any) -> None:
    """``SchedulePolicy.calc_priority``: the queue has been sorted; pieces of answers go first, in their order.

    Where requests have priorities, those still come before it.
    """
    if not any(place.continues for place in _PLACES.values()):
        return
    sign = policy.priority_sign if policy.enable_priority_scheduling else 0

    def order(request: Any) -> tuple[int, bool]:
        place = _PLACES.get(request)
        return sign * (request.priority or 0), place is None or not place.continues

    waiting.sort(key=order)
