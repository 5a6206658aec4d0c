"""Answers in pieces in SGLang's queue: its real policy sorts it, its real ``Req`` ends; no model runs."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_TOKEN
from sglang.srt.managers.schedule_policy import SchedulePolicy

from mem_triton.systems.payload import Place, RequestPayload, encode
from mem_triton.systems.request import CARRIER
from mem_triton_sglang import places


class Request(SimpleNamespace):
    """What the hooks look at of SGLang's ``Req``."""

    __hash__ = object.__hash__


def request(name: str, place: Place | None = None, **more) -> Request:
    carried = base64.b64encode(encode(RequestPayload({}, place=place))).decode()
    params = SimpleNamespace(custom_params={CARRIER: carried} if place else None)
    made = Request(rid=name, sampling_params=params, finished_reason=None, priority=None, **more)
    places.note(made)
    return made


def sorted_by(policy: str, queue: list[Request], priorities: bool = False) -> list[str]:
    """The queue as SGLang's policy leaves it, and then the hook."""
    tree = SimpleNamespace(
        disable=True, supports_fast_match_prefix=lambda: False, supports_prefix_sharing=lambda: False
    )
    real = SchedulePolicy(policy, tree, False, priorities, True)
    SchedulePolicy._sort_by_priority_and_fcfs(queue, 1) if priorities else None
    places.after_priority(None, real, queue)
    return [one.rid for one in queue]


def test_a_piece_that_continues_goes_to_the_front_and_the_others_stay_in_order():
    queue = [request("a"), request("first piece", Place("x", False, True)), request("b")]
    queue += [request("next", Place("y", True, True)), request("c"), request("last", Place("z", True, False))]
    assert sorted_by("fcfs", queue) == ["next", "last", "a", "first piece", "b", "c"]


def test_without_such_a_piece_the_queue_is_not_touched():
    class Untouched(list):
        def sort(self, **_) -> None:
            raise AssertionError("sorted")

    assert sorted_by("fcfs", Untouched([request("a"), request("b")])) == ["a", "b"]


def test_priorities_still_come_first():
    stats = SimpleNamespace(wait_queue_entry_time=0.0)
    queue = [request(name, time_stats=stats) for name in "ab"] + [
        request("next", Place("y", True, True), time_stats=stats)
    ]
    for one, priority in zip(queue, (1, 2, 2), strict=True):
        one.priority = priority
    assert sorted_by("fcfs", queue, priorities=True) == ["a", "next", "b"]


@pytest.fixture
def scheduler():
    memory = SimpleNamespace(places=places.Places())
    return SimpleNamespace(req_to_token_pool=SimpleNamespace(mem_triton=memory), waiting_queue=[])


def room(scheduler, free: int) -> tuple[int, bool]:
    """What the batch takes in one pass, and whether SGLang looks again in the next one."""
    batch = SimpleNamespace(batch_is_full=False)
    places.before_pass(scheduler, running_batch=batch)
    taken = places.after_room(free, scheduler)
    batch.batch_is_full = taken <= 0  # as SGLang does
    places.before_pass(scheduler, running_batch=batch)
    return taken, not batch.batch_is_full


def test_the_place_of_an_answer_stays_free_until_its_next_piece_has_come(scheduler):
    held = scheduler.req_to_token_pool.mem_triton.places
    piece = request("answer", Place("x", False, True))
    held.ended(piece)
    assert len(held) == 0, "it was retracted, not over"
    piece.finished_reason = FINISH_MATCHED_TOKEN(7)
    held.ended(piece)
    assert len(held) == 0, "it ended by itself"
    piece.finished_reason = FINISH_LENGTH(4)
    held.ended(piece)
    assert room(scheduler, 1) == (0, True) and room(scheduler, 3) == (2, True)
    scheduler.waiting_queue.append(request("newcomer"))
    assert room(scheduler, 1) == (0, True)
    scheduler.waiting_queue.append(request("answer", Place("x", True, False)))
    assert room(scheduler, 1) == (1, True) and len(held) == 0


def test_a_place_that_nobody_claims_is_given_up_after_the_same_passes_on_every_rank(scheduler):
    held = scheduler.req_to_token_pool.mem_triton.places
    piece = request("answer", Place("x", False, True))
    piece.finished_reason = FINISH_LENGTH(4)
    held.ended(piece)
    passes = 0
    while len(held):
        places.before_pass(scheduler, running_batch=SimpleNamespace(batch_is_full=False))
        passes += 1
    assert passes == places.RESERVED_PASSES and places.after_room(1, scheduler) == 1


def test_control_a_batch_that_was_called_full_would_stay_shut(scheduler, monkeypatch):
    monkeypatch.setattr(places, "before_pass", lambda *_, **__: None)
    held = scheduler.req_to_token_pool.mem_triton.places
    piece = request("answer", Place("x", False, True))
    piece.finished_reason = FINISH_LENGTH(4)
    held.ended(piece)
    assert room(scheduler, 1) == (0, False)


def test_a_hook_that_fails_leaves_things_as_they_are(scheduler, monkeypatch, caplog):
    def fails(*_) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(places, "_FAILED", set())
    monkeypatch.setattr(places, "_of", fails)
    monkeypatch.setattr(places, "_PLACES", None)
    for _ in range(2):
        assert places.after_room(3, scheduler) is None, "SGLang keeps its own result"
        assert places.before_pass(scheduler) is None and places.after_priority(None, None, []) is None
    assert caplog.text.count("are not kept") == 3


def test_what_cannot_be_read_has_no_place_and_ends_nothing():
    params = SimpleNamespace(custom_params={CARRIER: "no base64!"})
    broken = Request(rid="r", sampling_params=params)
    places.note(broken)
    assert broken not in places._PLACES
