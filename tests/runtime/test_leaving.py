"""Clients who leave, at every ``await`` of a request's memory: all is as if they had never come (faults 2 and 3).

A worker that answers late, an embedder that hangs, a deadline that passes: the others go on (faults 26, 28).
"""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from mem_triton.runtime.frontend.memory import Opened
from mem_triton.store.errors import BankError, EmbedderError
from mem_triton.store.pool.loads import LoadWait, MemoryLoadError, PageLoads
from mem_triton.store.pool.plan import Attachment
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.base import Outcome
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.explicit.searches import Found, Searches
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError
from tests.support.front import Waits, front_end

TOKENS = 16


class Worker:
    """One that fills pages and says so a little later. deaf: calls that are made and whose answers get lost."""

    def __init__(self) -> None:
        self.filled: list[str] = []
        self.deaf: set[int] = set()

    async def call(self, method: str, ref: str, pages: list[int], tokens: int):
        assert method == "load_page"
        self.filled.append(ref)
        number = len(self.filled)
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        if number in self.deaf:
            raise ConnectionError("the answer got lost")
        return [{"error": None, "stats": {}}]


def front(pages: int = 4) -> ExplicitFrontEnd:
    """One without an engine, whose search finds ``alice`` after a while."""
    front = object.__new__(ExplicitFrontEnd)
    front.residency, front._default, front.longest_step = Residency(pages, TOKENS), {}, 512
    front.layout = SimpleNamespace(max_pages=8, num_pages=pages)
    front.bank = SimpleNamespace(
        resolve=lambda ref, tenant: SimpleNamespace(tokens=TOKENS), spec=SimpleNamespace(kind="memory3")
    )
    front._logger = SimpleNamespace(warning=lambda *_: None)

    def found(*_, **__):
        time.sleep(0.01)
        return (Attachment("alice@1", 0, 64, 0.5),)

    front.retriever = SimpleNamespace(plan=found, extend=lambda plan, *_, **__: (*plan, *found()))
    front.max_model_len = 4096
    return front


def request_steps(memory: Waits, reading: Reading):
    async def run() -> None:
        try:
            await memory.claim(reading, [1, 2, 3])
            await memory.fill(reading)
            await memory.refresh(reading, 3, list(range(64)))
            await memory.fill(reading)
        finally:
            memory.memory.parts["memory"].close(reading)

    return run()


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003, 0.006, 0.009, 0.011, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04])
def test_fault02_and_03_whenever_a_client_leaves_nothing_stays_and_the_next_one_is_served(after):
    explicit, worker = front(), Worker()

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        task = asyncio.create_task(request_steps(memory, Reading(ReadingRequest(), top_k=1)))
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.05)  # a thread that still searches ends
        assert explicit.residency._tickets == {}, "whose ticket is this?"
        assert explicit.residency._ledger.pinned_pages == 0
        await asyncio.wait_for(request_steps(memory, Reading(ReadingRequest(), top_k=1)), 10)
        assert explicit.residency._tickets == {}

    asyncio.run(main())


def test_fault02_control_an_answer_that_leaves_with_its_client_wedges_the_entry(monkeypatch):
    """The loads in the client's own task, as they once were."""
    explicit, worker = front(), Worker()

    async def own_task(self, pending, alive=None) -> None:
        for load in self._residency.take_loads():
            await self._call("load_page", *load.order)
            self._residency.loaded(load.ref)
        while pending():
            await asyncio.sleep(0.001)

    monkeypatch.setattr(PageLoads, "wait", own_task)

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        readings = [Reading(ReadingRequest()) for _ in range(2)]
        for i, reading in enumerate(readings):
            reading.tickets.append(explicit.residency.request(f"r{i}", {"alice@1": TOKENS}))
        first = asyncio.create_task(memory.fill(readings[0]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(memory.fill(readings[1]), 1)

    asyncio.run(main())


@pytest.mark.parametrize("lost", [{1}, {1, 2}, {1, 2, 3}])
def test_fault02_an_order_whose_answer_gets_lost_is_given_again(lost):
    explicit, worker = front(), Worker()
    worker.deaf = lost

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        failed = []
        for i in range(len(lost) + 1):
            reading = Reading(ReadingRequest())
            reading.tickets.append(explicit.residency.request(f"r{i}", {"alice@1": TOKENS}))
            try:
                await asyncio.wait_for(memory.fill(reading), 10)
            except MemoryLoadError as error:
                assert "got lost" in str(error)
                failed.append(i)
            explicit.close(reading)
        assert failed == list(range(len(lost))), "the last one is served"

    asyncio.run(main())


def test_fault02_pages_that_a_release_gives_away_are_filled_at_once_for_who_waits():
    """Released in another thread, as refreshes are; nobody asks again and again."""
    explicit, worker = front(pages=1), Worker()

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        holder, waiter = Reading(ReadingRequest()), Reading(ReadingRequest())
        holder.tickets.append(explicit.residency.request("holder", {"alice@1": TOKENS}))
        await memory.fill(holder)
        waiter.tickets.append(explicit.residency.request("waiter", {"bob@1": TOKENS}))
        looks = []

        async def alive() -> None:
            looks.append(1)

        task = asyncio.create_task(memory.fill(waiter, alive))
        await asyncio.sleep(0)
        await asyncio.to_thread(explicit.close, holder)
        await asyncio.wait_for(task, 10)
        assert worker.filled == ["alice@1", "bob@1"] and len(looks) <= 4

    asyncio.run(main())


def test_fault02_control_a_release_that_nobody_hears_of_is_noticed_only_at_the_next_look(monkeypatch):
    explicit, worker = front(pages=1), Worker()
    monkeypatch.setattr(PageLoads, "_admitted", lambda self: None)
    monkeypatch.setattr("mem_triton.store.pool.loads.LOOK_SECONDS", 30.0)

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        holder, waiter = Reading(ReadingRequest()), Reading(ReadingRequest())
        holder.tickets.append(explicit.residency.request("holder", {"alice@1": TOKENS}))
        await memory.fill(holder)
        waiter.tickets.append(explicit.residency.request("waiter", {"bob@1": TOKENS}))
        task = asyncio.create_task(memory.fill(waiter))
        await asyncio.sleep(0)
        explicit.close(holder)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.5)

    asyncio.run(main())


# An abort and an order to the workers go different ways: the order may arrive first.


def abandoned(barrier) -> tuple[list[str], list[str]]:
    """A reader is taken from its engine; who has the pool's only page before and after the barrier was passed."""
    explicit, worker = front(pages=1), Worker()
    seen: list[list[str]] = []

    async def main() -> None:
        memory = front_end(explicit=explicit, call=worker.call)
        passed = asyncio.Event()
        memory.barrier = barrier and passed.wait
        opened = Opened({"memory": Reading(ReadingRequest(), waits=True)}, carried=True)
        opened.parts["memory"].tickets.append(explicit.residency.request("aborted", {"alice@1": TOKENS}))
        await memory.ready(opened)
        memory.abandon(opened)
        memory.close(opened)  # as others do who close what they opened
        explicit.residency.request("next", {"bob@1": TOKENS})
        await asyncio.sleep(0.01)
        seen.append([load.ref for load in explicit.residency.take_loads()])
        passed.set()
        while memory._owned:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen.append([load.ref for load in explicit.residency.take_loads()])
        assert list(explicit.residency._tickets) == ["next"]

    asyncio.run(main())
    return seen[0], seen[1]


def test_fault02_pages_of_an_aborted_request_are_given_away_only_behind_the_engines_barrier():
    assert abandoned(barrier=True) == ([], ["bob@1"])


def test_fault02_control_without_a_barrier_they_are_given_away_at_once():
    assert abandoned(barrier=False) == (["bob@1"], [])


def test_a_barrier_that_fails_frees_the_pages_all_the_same():
    explicit = front(pages=1)

    async def gone() -> None:
        raise RuntimeError("the engine is dead")

    async def main() -> None:
        memory = front_end(explicit=explicit, call=Worker().call)
        memory.barrier = gone
        opened = Opened({"memory": Reading(ReadingRequest(), waits=True)}, carried=True)
        opened.parts["memory"].tickets.append(explicit.residency.request("aborted", {"alice@1": TOKENS}))
        memory.abandon(opened)
        while memory._owned:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert explicit.residency._tickets == {}

    asyncio.run(main())


# An engine that sleeps is not called.


def test_what_is_under_way_ends_before_an_engine_sleeps_and_what_comes_waits_until_it_wakes():
    go_on, order = asyncio.Event(), []

    async def call(method: str, *args):
        order.append(f"{method} begins")
        await go_on.wait()
        order.append(f"{method} ends")
        return [None]

    async def main() -> None:
        memory = front_end(explicit=front(), call=call)
        first = asyncio.create_task(memory._rpc["memory"]("first"))
        await asyncio.sleep(0)
        sleeping = asyncio.create_task(memory.gate.shut())
        second = asyncio.create_task(memory._rpc["memory"]("second"))
        await asyncio.sleep(0.01)
        assert not sleeping.done() and order == ["first begins"]
        go_on.set()
        await asyncio.wait_for(sleeping, 10)
        await first
        await asyncio.sleep(0.01)
        assert order == ["first begins", "first ends"] and not second.done()
        memory.gate.open()
        assert await asyncio.wait_for(second, 10) == [None]

    asyncio.run(main())


def test_an_engine_does_not_sleep_over_a_call_that_never_ends_and_goes_on():
    async def call(method: str, *args):
        return [None] if method == "quick" else await asyncio.Event().wait()

    async def main() -> None:
        memory = front_end(explicit=front(), call=call)
        stuck = asyncio.create_task(memory._rpc["memory"]("slow"))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await memory.gate.shut(0.05)
        assert await asyncio.wait_for(memory._rpc["memory"]("quick"), 10) == [None]
        stuck.cancel()

    asyncio.run(main())


def test_fault03_a_request_that_is_over_claims_nothing():
    explicit = front()
    reading = Reading(ReadingRequest(), top_k=1)
    explicit.close(reading)
    reading.plan = (Attachment("alice@1"),)
    explicit.claim(reading)
    assert reading.tickets == [] and explicit.residency._tickets == {}


# Fault 26: embedders that are down or hang.


def failures(reason: str) -> float:
    return REGISTRY.get_sample_value("mem_triton:search_failures_total", {"reason": reason}) or 0.0


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EmbedderError("http://10.0.0.1:8000 is down"), "embedder"), (BankError("damaged"), "bank"), (OSError(5), "bank")],
)
def test_fault26_an_embedder_that_is_down_costs_the_references_and_says_so(error, kind):
    def search():
        raise error

    searches, before = Searches(), failures(kind)
    found = asyncio.run(searches.outcome(search))
    assert found.plan == () and found.failure and "10.0.0.1" not in found.failure, "no address is shown to clients"
    assert failures(kind) == before + 1


def test_fault26_an_embedder_that_hangs_delays_nobody_for_longer_than_the_deadline():
    go_on = threading.Event()
    searches = Searches(deadline=0.05, threads=2)

    async def main() -> None:
        found = await asyncio.gather(*(searches.outcome(go_on.wait, 30) for _ in range(6)))
        assert all(f.failure for f in found)
        assert (await searches.outcome(tuple)).failure == "earlier searches still hang"
        await asyncio.wait_for(asyncio.to_thread(int), 5)  # other threads are free
        go_on.set()
        while searches._hanging:
            await asyncio.sleep(0.001)
        assert (await searches.outcome(tuple)).failure is None

    asyncio.run(main())


def test_fault26_a_request_whose_search_failed_reads_what_it_named_and_says_why():
    explicit, worker = front(), Worker()
    explicit.retriever.plan = lambda *_, **__: 1 / 0

    async def main() -> None:
        memory = Waits(front_end(explicit=explicit, call=worker.call))
        reading = Reading(ReadingRequest(), (Attachment("bob@1"),), top_k=1, tokens={"bob@1": TOKENS})
        await memory.claim(reading, [1, 2, 3])
        await memory.fill(reading)
        assert reading.report()["retrieval"] == "off: the bank cannot be searched"
        assert [a.ref for a in reading.plan] == ["bob@1"]

    asyncio.run(main())


# Fault 28: every wait ends.


def test_fault28_pages_that_never_come_fail_the_request_and_free_pages_may_take_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    residency = Residency(1, TOKENS)
    loading, waiting = residency.request("a", {"a@1": TOKENS}), residency.request("b", {"b@1": TOKENS})
    first, second = LoadWait(60), LoadWait(60)
    for _ in range(3):
        first.look([loading])
        second.look([waiting])
        now[0] += 25
    with pytest.raises(MemoryLoadError, match="a@1: not loaded within 60 s"):
        first.look([loading])
    second.look([waiting])


# Fault 29: what no test missed.


def test_fault29_an_order_that_did_not_reach_the_workers_is_given_again():
    residency, worker, down = Residency(4, TOKENS), Worker(), [True]
    ticket = residency.request("r", {"alice@1": TOKENS})

    async def call(method: str, *args):
        if down and down.pop():
            raise ConnectionError("the workers cannot be called")
        return await worker.call(method, *args)

    async def main() -> None:
        loads = PageLoads(residency, call)
        with pytest.raises(MemoryLoadError, match="cannot be called"):
            await loads.wait(lambda: [ticket] if ticket.state != "ready" else [])
        await asyncio.wait_for(loads.wait(lambda: [ticket] if ticket.state != "ready" else []), 10)

    asyncio.run(main())


def test_fault29_a_search_that_times_out_by_itself_is_the_bank_s_failure_and_takes_no_thread():
    def late() -> None:
        raise TimeoutError("the disk")

    searches = Searches(threads=1)
    assert asyncio.run(searches.outcome(late)).failure == "the bank cannot be searched"
    assert asyncio.run(searches.outcome(late)).failure == "the bank cannot be searched" and not searches._hanging


def test_fault29_a_search_whose_client_left_before_it_began_is_not_made():
    go_on, made = threading.Event(), []
    searches = Searches(deadline=30, threads=1)

    async def main() -> None:
        first = asyncio.create_task(searches.outcome(go_on.wait, 30))
        second = asyncio.create_task(searches.outcome(made.append, "second"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        go_on.set()
        await first
        await searches.outcome(tuple)  # behind it

    asyncio.run(main())
    assert not made


def test_fault29_an_ending_that_fails_when_its_client_has_left_closes_what_was_opened():
    explicit, reading, go_on = front(), Reading(ReadingRequest(), (Attachment("bob@1"),)), asyncio.Event()
    explicit.claim(reading)
    closed = []

    async def main() -> None:
        async def fails(*_) -> None:
            await go_on.wait()
            raise RuntimeError("rank 1 is gone")

        memory, opened = front_end(explicit=explicit, call=Worker().call), Opened({"memory": reading})
        explicit.finish = fails
        task = asyncio.create_task(memory.end(opened, Outcome(True, 3, 1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        memory.close(opened)  # as who has left does
        assert explicit.residency._tickets, "it still ends"
        go_on.set()
        while memory._owned:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        closed.append(not explicit.residency._tickets)

    asyncio.run(main())
    assert closed == [True]


def test_fault29_references_that_found_no_free_pages_wait_for_none():
    explicit = front(pages=1)
    explicit.residency.request("other", {"bob@1": TOKENS})
    reading = Reading(ReadingRequest(), top_k=1)
    explicit.refresh(reading, 64, Found((Attachment("alice@1", 64, 128, 0.5),)))
    assert "no free pages" in reading.note and not reading.plan and not reading.tickets
    assert list(explicit.residency._tickets) == ["other"] and not explicit.residency._waiting


def test_fault29_who_is_refused_a_session_holds_no_references_and_no_name():
    released = []
    explicit, reading = front(), Reading(ReadingRequest(), capture=SimpleNamespace())
    explicit.captures = SimpleNamespace(release=released.append)
    explicit.admit = lambda request, params: reading

    def refuse(request, asked):
        raise RequestError("mem_session", "is being written")

    with pytest.raises(RequestError, match="being written"):
        front_end(SimpleNamespace(admit=refuse), explicit).open({"mem_session": "alice"}, RequestParams())
    assert reading.closed and released == [reading.capture]
