"""The front end that engines share, without one: what is cut, what is waited for, and what callers who leave leave."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from mem_triton.runtime.frontend.continuation import Continuation
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.sessions import SessionStore, StateLayout
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.lora import Adapter
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError
from tests.support.front import Waits, end, front_end


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 50), st.integers(1, 80))
def test_continuations_are_the_answer_in_one_piece(length, limit, every, engine_room):
    """An engine that stops by itself after ``length`` tokens, and has room for ``engine_room`` of them."""
    whole = list(range(length))
    answer, pieces = Continuation([-2, -1], every, limit), 0
    while not answer.done:
        start = len(answer.generated)
        assert answer.prompt_ids == [-2, -1, *whole[:start]]
        room = min(answer.room, engine_room - start)
        said = whole[start : start + room]
        answer.end(said, "stop" if start + len(said) == length and len(said) <= room else "length")
        pieces += 1
    assert answer.generated == whole[: min(limit, engine_room)]
    assert pieces <= len(answer.generated) // every + 1


@pytest.fixture
def sessions() -> SessionFrontEnd:
    sessions = object.__new__(SessionFrontEnd)  # no adapter on disk
    sessions.store = SessionStore(StateLayout(("l",), heads=1, rank=4, adapter="a", model="m"))
    sessions.obstacle, sessions._aborted, sessions._logger = None, deque(), logging.getLogger()
    return sessions


def busy(sessions: SessionFrontEnd, name: str = "alice") -> bool:
    try:
        sessions.store.close(sessions.store.open(SessionRequest(name)))
    except RequestError:
        return True
    return False


async def taken(method: str, *args):
    assert method == "take_state"
    return [{"position": args[1], "states": {"0": bytes(64)}}]


def test_a_caller_who_leaves_while_his_commit_is_queued_still_commits(sessions):
    """Every thread is busy when the commit comes, and the caller is gone before one is free."""
    memory, go_on = front_end(sessions, call=taken), threading.Event()

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        asyncio.get_running_loop().run_in_executor(None, go_on.wait, 30)
        opened = memory.open({"mem_session": "alice"}, RequestParams())
        task = asyncio.create_task(end(memory, opened, 2, 1))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        memory.close(opened)
        assert task.cancelled() and busy(sessions), "another writer now would undo the commit"
        go_on.set()
        for _ in range(1000):  # a loop that ends would cancel what is queued
            if not busy(sessions):
                return
            await asyncio.sleep(0.02)

    asyncio.run(main())
    lease = sessions.store.open(SessionRequest("alice"))
    assert (lease.start.version, lease.start.tokens) == (1, 2)


def test_a_state_that_cannot_be_taken_leaves_the_session_free_and_as_it_was(sessions):
    async def broken(method, *args):
        raise RuntimeError("rank 1 is gone")

    memory = front_end(sessions, call=broken)

    async def main():
        opened = memory.open({"mem_session": "alice"}, RequestParams())
        await end(memory, opened, 2, 1)
        (warning,) = opened.report()["warnings"]
        assert "was not committed and is as it was" in warning and "rank 1 is gone" in warning
        memory.close(opened)
        memory.close(opened)

    asyncio.run(main())
    assert not busy(sessions) and sessions.store.open(SessionRequest("alice")).start.version == 0


@pytest.mark.parametrize(
    "broken", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_fault17_a_session_that_cannot_be_committed_is_a_warning_beside_the_answer(sessions, monkeypatch, broken):
    """The session is as it was, free for the next request, and commits when there is room."""
    memory = front_end(sessions, call=taken)

    def ended():
        opened = memory.open({"mem_session": "alice"}, RequestParams())
        asyncio.run(end(memory, opened, 2, 1))
        return opened.report()

    def full(*_, **__):
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr(sessions.store, "commit", full)
        (warning,) = ended()["warnings"]
    assert 'mem_session "alice" was not committed and is as it was' in warning and "No space left" in warning
    assert not busy(sessions) and ended() is None
    assert sessions.store.open(SessionRequest("alice")).start.version == 1


@pytest.mark.parametrize(("fields", "normal"), [({"mem_session": "alice", "mem_write": 0}, True), ({}, True)])
def test_who_writes_nothing_takes_nothing(sessions, fields, normal):
    memory = front_end(sessions)
    asyncio.run(end(memory, memory.open(fields, RequestParams()), 2, 1, normal))
    assert not busy(sessions)


def test_fault16_whom_the_adapter_corrects_and_which_prefixes_are_shared(sessions):
    """By the scope where a request says nothing; a request that is not read holds no session."""
    memory = front_end(sessions)

    def opened(scope: str, **fields):
        sessions.scope = scope
        opened = memory.open(fields, RequestParams())
        payload = memory.payload(opened)
        write = None if payload is None else int(payload.systems["delta"].state.write)
        seen = write, memory.identity(opened), busy(sessions)
        memory.close(opened)
        assert not busy(sessions)
        return seen

    plain, off, alice = opened("all"), opened("all", mem_read=0), opened("all", mem_session="alice")
    assert plain[0] is None and off[0] == 0 and alice[0] == 1 and alice[2], "workers know what a plain one has"
    assert len({plain[1], off[1], alice[1]}) == 3
    assert opened("all", mem_read=1) == plain
    assert opened("all", mem_session="alice", mem_read=0) == off == opened("all", mem_write=0)

    stock = (None, None, False)
    assert opened("sessions") == stock, "the engine's own key: nothing tells it from a server without memory"
    assert opened("sessions", mem_read=0) == opened("sessions", mem_session="alice", mem_read=0) == stock
    assert opened("sessions", mem_write=0) == opened("sessions", mem_read=1, mem_write=0) == stock
    assert opened("sessions", mem_session="alice") == alice
    assert opened("sessions", mem_session="alice", mem_write=0)[0] == 0
    read = opened("sessions", mem_read=1)
    assert read[0] == 1 and read[1] == plain[1], "what a plain request is where the scope is all"
    with pytest.raises(RequestError, match=r"mem_read: .*without mem_triton\.delta"):
        front_end().open({"mem_read": 1}, RequestParams())


def test_fault16_after_an_incident_plain_requests_share_nothing_with_before(sessions):
    sessions.scope = "sessions"
    memory = front_end(sessions, incidents=SimpleNamespace(epoch=0))
    opened = memory.open({}, RequestParams())
    assert memory.identity(opened) is None and memory.identity(opened, among=()) is None
    memory.incidents.epoch = 1
    assert memory.identity(opened) is not None and memory.identity(opened, among=()) is not None
    assert memory.is_salted and not front_end(explicit=SimpleNamespace(corrects_plain=False)).is_salted


def test_an_aborted_answer_commits_nothing_and_workers_are_told_to_forget_it(sessions):
    memory = front_end(sessions)
    opened = memory.open({"mem_session": "alice"}, RequestParams())
    lease = opened.parts["delta"].lease
    asyncio.run(end(memory, opened, 2, 1, normal=False))
    assert not busy(sessions)
    assert sessions.take_arguments(lease, 5, 3) == (lease.id, 6, [lease.id]), "the third token was never fed"


@pytest.mark.parametrize(
    ("fields", "asked", "message"),
    [
        ({"mem_session": "a"}, RequestParams(answers=2), "mem_session: .*set n to 1, got 2"),
        ({"mem_session": "a"}, RequestParams(unfit="beam search"), "mem_session: beam search cannot"),
        ({"mem_ids": ["a"]}, RequestParams(), r"mem_ids: .*without mem_triton\.memory"),
        ({"mem_capture": "a"}, RequestParams(), r"mem_capture: .*without mem_triton\.memory"),
    ],
)
def test_refusals_name_the_field(sessions, fields, asked, message):
    with pytest.raises(RequestError, match=message):
        front_end(sessions).open(fields, asked)
    with pytest.raises(RequestError, match=r"mem_write: .*without mem_triton\.delta"):
        front_end().open({"mem_write": 0}, RequestParams())


class Workers:
    """Two workers that fill pages after a while; on the second one, entries whose name says so fail."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    async def call(self, method: str, ref: str, pages: list[int], tokens: int):
        assert method == "load_page" and len(pages) == -(-tokens // 16)
        self.orders.append(ref)
        await asyncio.sleep(0.001)
        return [{"error": "lost" if rank and "bad" in ref else None, "stats": {}} for rank in (0, 1)]


def reader(residency: Residency, owner: str, **tokens: int) -> Reading:
    return Reading(ReadingRequest(), tickets=[residency.request(owner, tokens)])


def waits(residency: Residency, workers: Workers) -> Waits:
    explicit = object.__new__(ExplicitFrontEnd)
    explicit.residency = residency
    return Waits(front_end(explicit=explicit, call=workers.call))


def test_many_wait_and_one_tells_the_workers():
    residency, workers = Residency(4, 16), Workers()

    async def main():
        memory = waits(residency, workers)
        readings = [reader(residency, f"r{i}", alice=16, **{f"own{i % 2}": 16}) for i in range(8)]
        await asyncio.gather(*(memory.fill(reading) for reading in readings))
        assert not any(reading.pending for reading in readings)

    asyncio.run(main())
    assert sorted(workers.orders) == ["alice", "own0", "own1"], "each entry is ordered once"


def test_an_entry_that_cannot_be_read_fails_those_who_need_it_alone():
    residency, workers = Residency(4, 16), Workers()

    async def main():
        memory = waits(residency, workers)
        good, bad = reader(residency, "good", alice=16), reader(residency, "bad", bad=16, alice=16)
        results = await asyncio.gather(memory.fill(good), memory.fill(bad), return_exceptions=True)
        assert results[0] is None and isinstance(results[1], MemoryLoadError) and "lost" in str(results[1])

    asyncio.run(main())


def test_a_wait_ends_when_nobody_waits_any_more():
    residency, workers = Residency(1, 16), Workers()

    async def gone():
        raise ConnectionError("hung up")

    async def main():
        memory = waits(residency, workers)
        await memory.fill(reader(residency, "holds", alice=16))
        with pytest.raises(ConnectionError):
            await memory.fill(reader(residency, "waits", bob=16), gone)
        residency.release("waits")
        residency.release("holds")
        await memory.fill(reader(residency, "next", carol=16))

    asyncio.run(main())
    assert workers.orders == ["alice", "carol"]


def test_fault27_a_session_is_refused_under_another_lora_adapter(sessions):
    memory = front_end(sessions, call=taken)
    opened = memory.open({"mem_session": "alice"}, RequestParams(lora=Adapter("poet:1")))
    asyncio.run(end(memory, opened, 2, 1))
    for lora in (None, Adapter("poet:2")):
        with pytest.raises(RequestError, match=r"mem_session.*LoRA"):
            memory.open({"mem_session": "alice"}, RequestParams(lora=lora))
    memory.close(memory.open({"mem_session": "alice"}, RequestParams(lora=Adapter("poet:1"))))


def test_fault14_a_session_whose_adapter_was_loaded_anew_while_it_answered_is_not_committed(sessions):
    memory, stays = front_end(sessions, call=taken), [False]
    for version in (0, 1):
        opened = memory.open({"mem_session": "alice"}, RequestParams(lora=Adapter("poet:1", "#1", lambda: stays[0])))
        asyncio.run(end(memory, opened, 2, 1))
        warned = (opened.report() or {}).get("warnings", [])
        assert bool(warned) == (version == 0) and all("LoRA adapter was loaded anew" in text for text in warned)
        with_it = memory.open({"mem_session": "alice"}, RequestParams(lora=Adapter("poet:1")))
        assert with_it.parts["delta"].lease.start.version == version
        memory.close(with_it)
        stays[0] = True
