"""Tiers of memory: who owns pages keeps them, fetches are shared, and nobody waits for another's disk.

No test here measures time: a load waits at a gate that the test opens.
"""

from __future__ import annotations

import threading

import pytest

from mem_triton.store.fetching import Fetcher
from mem_triton.store.ledger import PageLedger
from mem_triton.store.tiers import MemoryTiers, PoolCapacityError
from tests.store.tiers_case import PAGE, SOON, Bench, Disk

SIZES = {f"{name}@1": 4 * (1 + i % 2) for i, name in enumerate("abcdefgh")}  # a, c, e, g: one page; b, d, f, h: two


def disk(**options) -> Disk:
    return Disk(dict(SIZES), **options)


def test_a_request_returns_at_once_and_is_ready_when_its_pages_are_filled():
    with Bench(disk(gated={"a@1"})) as bench:
        ticket = bench.tiers.request(["a@1", "b@1"], "r")
        assert ticket.state() == "loading" and ticket.wait(0) == "loading"
        with pytest.raises(KeyError, match="a@1 is not on the device"):
            bench.tiers.run_of("a@1")
        bench.disk.open("a@1")
        assert ticket.wait(SOON) == "ready" and bench.holds("a@1") and bench.holds("b@1")
        assert bench.tiers.request([], "nothing").state() == "ready"


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16])
def test_the_last_page_may_be_partly_filled(tokens):
    with Bench(Disk({"x@1": tokens})) as bench:
        bench.ready("x@1", "r")
        assert bench.holds("x@1")
        assert bench.tiers.run_of("x@1").tokens[-1] == (tokens - 1) % PAGE + 1


def test_hits_are_ready_while_every_disk_thread_is_stuck():
    with Bench(disk(gated={"c@1", "e@1", "g@1"}), pages=4, host_pages=4, workers=2) as bench:
        bench.ready("a@1", "first")
        slow = [bench.tiers.request([ref], ref) for ref in ("c@1", "e@1", "g@1")]  # the third waits for a thread
        bench.disk.wait_until_loading("c@1")
        bench.disk.wait_until_loading("e@1")
        assert bench.tiers.request(["a@1"], "hit").state() == "ready"
        assert [t.state() for t in slow] == ["loading"] * 3 and bench.holds("a@1")


def test_what_the_host_has_does_not_queue_behind_the_disk():
    with Bench(disk(gated={"c@1", "e@1"}), pages=3, host_pages=4, workers=2) as bench:
        bench.ready("a@1", "r")
        bench.tiers.release("r")
        bench.ready("b@1 g@1", "r")  # a leaves the device
        bench.tiers.release("r")
        for ref in ("c@1", "e@1"):
            bench.tiers.request([ref], ref)
            bench.disk.wait_until_loading(ref)
        assert bench.ready("a@1", "quick") and bench.holds("a@1")
        assert bench.disk.loads["a@1"] == 1 and bench.tiers.stats()["hits.host"] == 1


def test_two_owners_fetch_an_entry_once():
    with Bench(disk(gated={"a@1"})) as bench:
        one, two = (bench.tiers.request(["a@1"], owner) for owner in ("one", "two"))
        bench.disk.open("a@1")
        assert one.wait(SOON) == two.wait(SOON) == "ready"
        assert bench.disk.loads == {"a@1": 1}
        bench.tiers.release("one")
        bench.tiers.release("one")
        assert bench.tiers.stats()["pinned.device"] == 1, "the other still owns it"
        bench.tiers.release("two")
        assert bench.tiers.stats()["pinned.device"] == 0 and bench.holds("a@1"), "it stays until the room is needed"


def test_control_without_the_guard_an_entry_is_fetched_twice(monkeypatch):
    monkeypatch.setattr(MemoryTiers, "_is_coming", lambda self, ref: self._device.is_ready(ref))
    with Bench(disk(gated={"a@1"})) as bench:
        for owner in ("one", "two"):
            bench.tiers.request(["a@1"], owner)
        bench.disk.wait_until_loading("a@1", count=2)


def test_many_threads_that_ask_at_once_fetch_each_entry_once():
    with Bench(disk(), pages=6) as bench:
        start, states = threading.Barrier(8), []

        def ask(owner: str) -> None:
            start.wait(SOON)
            states.append(bench.tiers.request(["a@1", "b@1", "c@1"], owner).wait(SOON))

        threads = [threading.Thread(target=ask, args=(f"r{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert states == ["ready"] * 8 and set(bench.disk.loads.values()) == {1}
        assert all(bench.holds(ref) for ref in ("a@1", "b@1", "c@1"))


def test_owned_pages_stay_and_the_newcomer_waits_for_them():
    with Bench(disk(), pages=2) as bench:
        bench.ready("b@1", "running")
        newcomer = bench.tiers.request(["a@1"], "newcomer")
        assert newcomer.wait(0) == "waiting" and bench.holds("b@1")
        assert bench.tiers.request(["b@1"], "hit").state() == "ready", "a hit needs no room and does not queue"
        bench.tiers.release("running")
        assert newcomer.state() == "waiting", "the hit owns the pages, too"
        bench.tiers.release("hit")
        assert newcomer.wait(SOON) == "ready" and bench.holds("a@1")


def test_control_without_pins_a_running_request_reads_anothers_memory(monkeypatch):
    monkeypatch.setattr(PageLedger, "_may_go", staticmethod(lambda entry: entry.ready))
    with Bench(disk(), pages=2) as bench:
        bench.ready("b@1", "running")
        pages = bench.tiers.run_of("b@1").pages
        before = bench.pool.read(pages)
        bench.ready("d@1", "newcomer")
        assert not before.data.equal(bench.pool.read(pages).data)


def test_waiting_is_first_come_first_served():
    with Bench(disk(gated={"b@1"}), pages=3) as bench:
        bench.ready("d@1", "running")
        bench.ready("a@1", "also running")
        big, small = bench.tiers.request(["b@1"], "big"), bench.tiers.request(["c@1"], "small")
        bench.tiers.release("also running")
        assert (big.state(), small.state()) == ("waiting", "waiting"), "the small one may not overtake for ever"
        bench.tiers.release("running")
        assert big.state() == "loading" and small.wait(SOON) == "ready"


def test_who_waits_holds_nothing():
    """Two that each held what the other needs would wait for ever."""
    with Bench(disk(), pages=3) as bench:
        bench.ready("b@1", "running")
        one = bench.tiers.request(["c@1", "d@1"], "one")
        two = bench.tiers.request(["c@1", "f@1"], "two")
        assert (one.state(), two.state()) == ("waiting", "waiting")
        assert bench.tiers.stats()["pinned.device"] == 2
        bench.tiers.release("running")
        assert one.wait(SOON) == "ready" and two.state() == "waiting"
        bench.tiers.release("one")
        assert two.wait(SOON) == "ready" and bench.holds("c@1") and bench.holds("f@1")


def test_a_waiting_request_that_leaves_lets_the_next_one_in():
    with Bench(disk(), pages=3) as bench:
        bench.ready("b@1", "running")
        big, small = bench.tiers.request(["d@1"], "big"), bench.tiers.request(["a@1"], "small")
        assert (big.state(), small.state()) == ("waiting", "waiting")
        bench.tiers.release("big")
        assert small.wait(SOON) == "ready" and (big.wait(0), big.error) == ("failed", "released before it was ready")


def test_the_least_recently_used_entry_makes_room():
    with Bench(disk(), pages=3) as bench:
        for ref in ("a@1", "c@1", "e@1"):
            bench.ready(ref, "r")
            bench.tiers.release("r")
        bench.ready("a@1", "r")  # used again: now c is the oldest
        bench.tiers.release("r")
        bench.ready("g@1", "r")
        assert bench.holds("a@1") and bench.holds("e@1")
        with pytest.raises(KeyError):
            bench.tiers.run_of("c@1")


def test_what_never_fits_is_refused_at_once_and_says_what_to_change():
    with Bench(disk(), pages=3) as bench:
        with pytest.raises(PoolCapacityError, match=r"needs 4 memory pages.* 3 of the pool's 3.*pool_gib of at least"):
            bench.tiers.request(["b@1", "d@1"], "r")
        assert bench.tiers.pin(["a@1"]).wait(SOON) == "ready"
        with pytest.raises(PoolCapacityError, match=r"b@1, c@1: needs 3 memory pages.* 2 of the pool's 3") as refused:
            bench.tiers.request(["b@1", "c@1"], "r")
        assert (refused.value.needed, refused.value.available) == (3, 2)
        assert bench.ready("a@1 b@1", "r"), "a default needs no room of its own"
        with pytest.raises(PoolCapacityError):
            bench.tiers.request(["c@1"], "r")  # beside what it owns itself
        assert bench.disk.loads == {"a@1": 1, "b@1": 1}


def test_defaults_stay_for_ever_and_a_waiter_that_they_shut_out_is_told():
    with Bench(disk(), pages=3) as bench:
        bench.ready("e@1", "running")
        waiting = bench.tiers.request(["b@1", "c@1"], "waiting")
        assert waiting.state() == "waiting"
        bench.tiers.release("running")
        assert waiting.wait(SOON) == "ready"
        bench.tiers.release("waiting")
        bench.ready("d@1", "running")
        waiting = bench.tiers.request(["b@1", "c@1"], "waiting")
        late = bench.tiers.pin(["d@1"])
        assert late.state() == "ready"
        bench.tiers.release("running")
        assert waiting.wait(SOON) == "failed" and "pool_gib" in waiting.error
        bench.ready("a@1", "r")
        assert bench.holds("d@1")


def test_a_failed_load_fails_who_needs_it_shows_nothing_and_can_be_tried_again():
    with Bench(disk(gated={"a@1"}, broken={"a@1"}), host_pages=4) as bench:
        bad, also = bench.tiers.request(["a@1", "c@1"], "bad"), bench.tiers.request(["a@1"], "also")
        good = bench.tiers.request(["c@1"], "good")
        bench.disk.open("a@1")
        assert bad.wait(SOON) == also.wait(SOON) == "failed" and good.wait(SOON) == "ready"
        assert bad.error == "a@1: OSError: disk on fire"
        with pytest.raises(KeyError):
            bench.tiers.run_of("a@1")
        assert bench.tiers.stats()["used.device"] == 1, "its pages are free again"
        bench.disk.broken.clear()
        assert bench.ready("a@1", "again") and bench.holds("a@1") and bench.holds("c@1")
        for owner in ("bad", "also", "good", "again"):
            bench.tiers.release(owner)
        assert bench.tiers.stats()["pinned.device"] == 0


def test_a_failure_lets_waiting_requests_in():
    with Bench(disk(gated={"b@1"}, broken={"b@1"}), pages=2) as bench:
        bench.tiers.request(["b@1"], "bad")
        waiting = bench.tiers.request(["a@1"], "waiting")
        assert waiting.state() == "waiting"
        bench.disk.open("b@1")
        assert waiting.wait(SOON) == "ready"


@pytest.mark.parametrize("host_pages", [0, 4])
def test_an_entry_that_is_not_what_was_announced_is_refused(host_pages):
    with Bench(disk(), host_pages=host_pages) as bench:
        bench.tiers._tokens = lambda ref: SIZES[ref] + PAGE
        ticket = bench.tiers.request(["a@1"], "r")
        assert ticket.wait(SOON) == "failed" and "4 tokens on disk, 2 pages" in ticket.error
        bench.tiers._tokens = SIZES.get
        bench.tiers.release("r")
        assert bench.ready("a@1", "r") and bench.holds("a@1")


def test_nobody_reads_half_filled_pages():
    """A request that leaves while its entry is loading leaves the pages to the fetch until it is over."""
    with Bench(disk(gated={"b@1"}), pages=2) as bench:
        gone = bench.tiers.request(["b@1"], "gone")
        bench.disk.wait_until_loading("b@1")
        bench.tiers.release("gone")
        waiting = bench.tiers.request(["a@1"], "next")
        assert gone.state() == "failed" and waiting.state() == "waiting"
        bench.disk.open("b@1")
        assert waiting.wait(SOON) == "ready" and bench.holds("a@1")


def test_control_pages_that_are_shown_before_the_copy_are_empty(monkeypatch):
    begin = Fetcher.start

    def shown_early(self: Fetcher, fetch) -> None:
        begin(self, fetch)
        self._over.__self__._device.fill(fetch.ref)  # of the tiers, whose lock is held

    monkeypatch.setattr(Fetcher, "start", shown_early)
    with Bench(disk(gated={"a@1"})) as bench:
        assert bench.tiers.request(["a@1"], "r").state() == "ready" and not bench.holds("a@1")


def test_a_fetch_that_nobody_wants_any_more_is_not_begun():
    with Bench(disk(gated={"a@1"}), pages=3, workers=1) as bench:
        bench.tiers.request(["a@1"], "slow")
        bench.disk.wait_until_loading("a@1")
        bench.tiers.request(["b@1"], "gone")
        bench.tiers.release("gone")
        waiting = bench.tiers.request(["d@1"], "next")
        bench.disk.open("a@1")
        assert waiting.wait(SOON) == "ready" and bench.holds("d@1")
        assert bench.disk.loads["b@1"] == 0 and bench.tiers.stats()["abandoned"] == 1


def test_close_fails_whoever_waits_and_can_be_repeated():
    bench = Bench(disk(gated={"b@1"}), pages=2)
    loading = bench.tiers.request(["b@1"], "loading")
    waiting = bench.tiers.request(["a@1"], "waiting")
    bench.disk.wait_until_loading("b@1")
    closing = threading.Thread(target=bench.tiers.close)
    closing.start()
    assert loading.wait(SOON) == waiting.wait(SOON) == "failed" and waiting.error == "the pool was closed"
    bench.disk.open("b@1")
    closing.join(SOON)
    assert not closing.is_alive() and not any(t.is_alive() for t in bench.tiers._fetcher._threads)
    bench.tiers.close()
    bench.tiers.release("loading")
    with pytest.raises(RuntimeError, match="closed"):
        bench.tiers.request(["a@1"], "late")
    assert not bench.pool.read([0, 1]).data.any(), "the load came back too late to fill a page"


def test_close_does_not_wait_for_a_disk_that_never_answers(caplog):
    bench = Bench(disk(gated={"a@1"}), workers=1)
    bench.tiers.request(["a@1"], "r")
    bench.disk.wait_until_loading("a@1")
    bench.tiers.close(timeout=0.05)
    assert "left behind" in caplog.text
    assert all(thread.daemon for thread in bench.tiers._fetcher._threads)
    bench.disk.open("a@1")
