"""Entries on their way into pages: the host cache, the order of copies and steps, failures, and what counters say.

No test here measures time: a load waits at a gate that the test opens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from prometheus_client import REGISTRY

from mem_triton.store.pool import metrics
from mem_triton.store.pool.fetching import Fetcher
from mem_triton.store.pool.ledger import PageLedger
from mem_triton.store.pool.streams import HostCopies
from tests.runtime.loading_case import PAGE, SOON, Bench, Disk, block

ONE_PAGE = {f"{name}@1": PAGE for name in "abcdef"}
MIXED = {f"{name}@1": PAGE * (1 + i % 2) for i, name in enumerate("abcdefgh")}  # a, c, e, g: one page; the others: two


def test_a_request_returns_at_once_and_is_ready_when_its_pages_are_filled():
    with Bench(Disk(dict(MIXED), gated={"a@1"})) as bench:
        ticket = bench.request("a@1 b@1", "r")
        assert ticket.state == "loading"
        bench.disk.open("a@1")
        assert bench.wait(ticket) == "ready" and bench.holds("a@1") and bench.holds("b@1")


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16])
def test_the_last_page_may_be_partly_filled(tokens):
    with Bench(Disk({"x@1": tokens})) as bench:
        bench.ready("x@1", "r")
        assert bench.holds("x@1")


def test_hits_are_ready_while_every_disk_thread_is_stuck():
    with Bench(Disk(dict(MIXED), gated={"c@1", "e@1", "g@1"}), pages=4, host_pages=4) as bench:
        bench.ready("a@1", "first")
        slow = [bench.request(ref, ref) for ref in ("c@1", "e@1", "g@1")]  # the third waits for a thread
        bench.disk.wait_until_loading("c@1")
        bench.disk.wait_until_loading("e@1")
        assert bench.request("a@1", "hit").state == "ready"
        assert [t.state for t in slow] == ["loading"] * 3 and bench.holds("a@1")


def test_what_the_host_has_does_not_queue_behind_the_disk():
    with Bench(Disk(dict(MIXED), gated={"c@1", "e@1"}), pages=3, host_pages=4) as bench:
        bench.visit("a@1")
        bench.ready("b@1 g@1", "r")  # a leaves the device
        bench.residency.release("r")
        for ref in ("c@1", "e@1"):
            bench.request(ref, ref)
            bench.disk.wait_until_loading(ref)
        assert bench.ready("a@1", "quick") and bench.holds("a@1")
        assert bench.disk.loads["a@1"] == 1 and bench.loader.stats()["hits.host"] == 1


def test_two_owners_load_an_entry_once():
    with Bench(Disk(dict(MIXED), gated={"a@1"})) as bench:
        tickets = [bench.request("a@1", owner) for owner in ("one", "two")]
        bench.disk.open("a@1")
        assert [bench.wait(ticket) for ticket in tickets] == ["ready", "ready"]
        assert bench.disk.loads == {"a@1": 1}


def test_control_without_pins_a_running_request_reads_anothers_memory(monkeypatch):
    monkeypatch.setattr(PageLedger, "_may_go", staticmethod(lambda entry: entry.ready))
    with Bench(Disk(dict(MIXED)), pages=2) as bench:
        bench.ready("b@1", "running")
        pages = bench.run_of("b@1")
        before = bench.pool.read(pages)
        bench.ready("d@1", "newcomer")
        assert not before.data.equal(bench.pool.read(pages).data)


def test_a_failed_load_fails_who_needs_it_shows_nothing_and_can_be_tried_again():
    with Bench(Disk(dict(MIXED), gated={"a@1"}, broken={"a@1"}), host_pages=4) as bench:
        bad, also, good = bench.request("a@1 c@1", "bad"), bench.request("a@1", "also"), bench.request("c@1", "good")
        bench.disk.open("a@1")
        assert bench.wait(bad) == bench.wait(also) == "failed: a@1: OSError: disk on fire"
        assert bench.wait(good) == "ready"
        with pytest.raises(KeyError):
            bench.run_of("a@1")
        bench.disk.broken.clear()
        assert bench.ready("a@1", "again") and bench.holds("a@1") and bench.holds("c@1")


@pytest.mark.parametrize("host_pages", [0, 4])
def test_an_entry_that_is_not_what_was_announced_is_refused(host_pages):
    with Bench(Disk(dict(ONE_PAGE)), host_pages=host_pages) as bench:
        ticket = bench.residency.request("r", {"a@1": 2 * PAGE})
        assert bench.wait(ticket) == "failed: a@1: ValueError: 4 tokens on disk, 2 pages were reserved for it"
        bench.residency.release("r")
        assert bench.ready("a@1", "r") and bench.holds("a@1")


def test_nobody_reads_half_filled_pages():
    """A request that leaves while its entry is loading leaves the pages to the load until it is over."""
    with Bench(Disk(dict(MIXED), gated={"b@1"}), pages=2) as bench:
        bench.request("b@1", "gone")
        bench.disk.wait_until_loading("b@1")
        bench.residency.release("gone")
        waiting = bench.request("a@1", "next")
        assert waiting.state == "waiting"
        bench.disk.open("b@1")
        assert bench.wait(waiting) == "ready" and bench.holds("a@1")


def test_control_pages_that_are_shown_before_the_copy_are_empty(monkeypatch):
    with Bench(Disk(dict(ONE_PAGE), gated={"a@1"})) as bench:
        begin = Fetcher.start

        def shown_early(self: Fetcher, fetch) -> None:
            begin(self, fetch)
            bench.residency.loaded(fetch.ref)

        monkeypatch.setattr(Fetcher, "start", shown_early)
        assert bench.request("a@1", "r").state == "ready" and not bench.holds("a@1")


def test_closing_drops_what_has_not_begun_and_fills_nothing_any_more():
    bench = Bench(Disk(dict(MIXED), gated={"a@1"}), workers=1)
    bench.request("a@1", "loading")
    bench.disk.wait_until_loading("a@1")
    bench.request("c@1", "behind")
    closing = threading.Thread(target=bench.loader.close)
    closing.start()
    while not bench.loader._fetcher._closed:
        assert closing.is_alive()
    bench.disk.open("a@1")
    closing.join(SOON)
    assert not closing.is_alive() and not any(t.is_alive() for t in bench.loader._fetcher._threads)
    assert bench.disk.loads == {"a@1": 1} and not any(over.done() for over in bench._under_way.values())
    assert not bench.pool.read([0, 1]).data.any(), "the load came back too late to fill a page"


def test_closing_does_not_wait_for_a_disk_that_never_answers(caplog):
    bench = Bench(Disk(dict(MIXED), gated={"a@1"}), workers=1)
    bench.request("a@1", "r")
    bench.disk.wait_until_loading("a@1")
    bench.loader._fetcher.close(timeout=0.05)
    assert "left behind" in caplog.text
    assert all(thread.daemon for thread in bench.loader._fetcher._threads)
    bench.disk.open("a@1")


# The host cache of placed pages.


def test_the_host_keeps_what_left_the_device_until_its_bytes_are_spent():
    disk = Disk({**ONE_PAGE, "big@1": 3 * PAGE})
    with Bench(disk, pages=3, host_pages=3) as bench:
        bench.visit("a@1", "b@1", "c@1", "d@1", "a@1")  # d pushes a out of both tiers: it was used longest ago
        assert disk.loads == {"a@1": 2, "b@1": 1, "c@1": 1, "d@1": 1}
        bench.visit("big@1")  # all pages of both tiers
        bench.visit("c@1")
        assert disk.loads["c@1"] == 2 and bench.loader.stats()["used.host"] == 1


def test_an_entry_larger_than_the_host_cache_is_served_past_it():
    disk = Disk({"big@1": 3 * PAGE, "a@1": PAGE})
    with Bench(disk, pages=3, host_pages=2) as bench:
        bench.visit("a@1", "big@1", "a@1")
        assert disk.loads == {"a@1": 1, "big@1": 1} and bench.loader.stats()["hits.host"] == 1


def test_entries_scattered_over_pages_come_back_whole():
    """Holes of one page in both tiers, then an entry of three pages."""
    disk = Disk({**ONE_PAGE, "long@1": 11})
    with Bench(disk, pages=5, host_pages=5) as bench:
        bench.visit("a@1", "b@1", "c@1", "d@1", "e@1")
        bench.visit("b@1", "d@1")  # a, c and e are the oldest now
        bench.visit("long@1")
        assert bench.run_of("long@1") == (0, 2, 4)
        bench.visit("a@1", "c@1", "e@1", "long@1")
        assert bench.holds("long@1")


def test_the_host_cache_keeps_quantised_pages_as_they_are():
    disk = Disk(dict(ONE_PAGE))
    with Bench(disk, pages=1, host_pages=4, dtype=torch.int8) as bench:
        seen = []
        for ref in ("a@1", "b@1", "a@1"):
            bench.visit(ref)
            seen.append(bench.pool.read([0]))
        assert disk.loads["a@1"] == 1
        assert all(torch.equal(x, y) for x, y in zip(seen[0], seen[2], strict=True))
        keys, _ = bench.pool.layout.unpack(seen[2], PAGE)
        true = block("a@1", PAGE).keys + 1
        assert ((keys - true).norm() / true.norm()).item() < 0.01


# Order of copies and steps. A GPU runs what is queued later than it is queued; here everything queued is written down.


@dataclass
class WrittenDown(HostCopies):
    """Numbered marks, what each copy waited for, and what the steps' stream was ordered behind."""

    marks: int = 0
    waited_for: list[list[int]] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def run(self, copy: Callable[[], None], after) -> str:
        self.waited_for.append(sorted(after))
        copy()
        return f"copy {len(self.waited_for)}"

    def join(self, copies) -> None:
        self.joined += copies


def written_down(bench: Bench) -> WrittenDown:
    copies = bench.loader._fetcher.copies = WrittenDown()
    return copies


def test_a_page_is_overwritten_only_behind_the_steps_queued_when_its_load_was_ordered():
    """That is after its last reader was released, so those steps are among them."""
    with Bench(Disk(dict(ONE_PAGE), gated={"b@1"}), pages=1) as bench:
        copies = written_down(bench)
        bench.visit("a@1")
        waiting = bench.request("b@1", "next")
        bench.disk.wait_until_loading("b@1")
        assert copies.marks == 2, "marked when ordered, not when the disk has answered"
        copies.mark()  # a step queued later need not be waited for: it does not read these pages
        bench.disk.open("b@1")
        assert bench.wait(waiting) == "ready" and copies.waited_for == [[1], [2]]


def test_steps_are_ordered_behind_finished_copies_alone_and_behind_each_once():
    with Bench(Disk(dict(ONE_PAGE), gated={"b@1"})) as bench:
        copies = written_down(bench)
        bench.ready("a@1", "r")
        slow = bench.request("b@1", "slow")
        bench.disk.wait_until_loading("b@1")
        bench.loader.before_step()
        assert copies.joined == ["copy 1"] and slow.state == "loading"
        bench.loader.before_step()
        assert copies.joined == ["copy 1"]
        bench.disk.open("b@1")
        assert bench.wait(slow) == "ready"
        bench.loader.before_step()
        assert copies.joined == ["copy 1", "copy 2"]


def test_small_host_hits_that_wait_together_are_copied_together():
    """Behind a copy that waits for a long step."""
    with Bench(Disk(dict(ONE_PAGE)), pages=4, host_pages=6) as bench:
        bench.visit(*ONE_PAGE)  # all are on the host, and the last four on the device
        copies, first, go = written_down(bench), threading.Event(), threading.Event()
        run = copies.run

        def slow(copy: Callable[[], None], after) -> str:
            first.set()
            assert go.wait(SOON)
            return run(copy, after)

        copies.run = slow
        tickets = [bench.request("a@1", "one")]
        assert first.wait(SOON)
        tickets += [bench.request(ref, ref) for ref in ("b@1", "c@1", "d@1")]
        assert [t.state for t in tickets] == ["loading"] * 4
        go.set()
        assert [bench.wait(t) for t in tickets] == ["ready"] * 4
        assert len(copies.waited_for) == 2 and all(map(bench.holds, ("a@1", "b@1", "c@1", "d@1")))


# Counters and sizes.


def test_the_counters_add_up():
    names = ("hits", "misses", "evictions", "bytes")
    samples = [(f"mem_triton:pool_{name}_total", tier) for name in names for tier in ("device", "host", "disk")]

    def now() -> dict[tuple[str, str], float]:
        return {(n, t): REGISTRY.get_sample_value(n, {"tier": t}) or 0.0 for n, t in samples}

    def gauge(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before, fetched = now(), gauge("mem_triton:pool_fetch_seconds_count", tier="host")
    used = gauge("mem_triton:pool_used_bytes", tier="device")
    with Bench(Disk(dict(ONE_PAGE)), pages=2, host_pages=3) as bench:
        bench.visit("a@1", "b@1", "a@1", "c@1", "b@1", "d@1")  # device: 1 hit; host: b is a hit
        page = bench.pool.layout.page_bytes
        bench.ready("d@1", "r")
        assert gauge("mem_triton:pool_pinned_pages") == 1
        assert gauge("mem_triton:pool_used_bytes", tier="device") - used == 2 * page
        stats = bench.loader.stats()
    worker = {
        "hits.host": 1,
        "misses.host": 4,
        "evictions.host": 1,
        "bytes.host": page,
        "bytes.disk": 4 * page,
        "fetched": 5,
        "used.host": 3,
    }
    assert stats == worker
    expected = {**worker, "hits.device": 2, "misses.device": 5, "evictions.device": 3}
    for (name, tier), value in now().items():
        assert value - before[name, tier] == expected.get(f"{name[16:-6]}.{tier}", 0), (name, tier)
    assert gauge("mem_triton:pool_fetch_seconds_count", tier="host") - fetched == 1


def test_waiting_requests_are_shown():
    shown = metrics.POOL_WAITING._value.get
    with Bench(Disk(dict(ONE_PAGE)), pages=1) as bench:
        bench.ready("a@1", "r")
        bench.request("b@1", "waits")
        assert shown() == 1
        bench.residency.release("waits")
        assert shown() == 0


def test_a_ledger_gives_neighbouring_pages_while_it_can():
    ledger = PageLedger(8, 1, "device")
    assert ledger.reserve("a", 3, 9) == (0, 1, 2) and ledger.reserve("b", 2, 8) == (3, 4)
    ledger.fill("a")
    assert ledger.room() == 6 and ledger.room(besides=["a"]) == 3 and ledger.room(besides=["b"]) == 6
    assert ledger.reserve("c", 4, 16) == (0, 1, 2, 5) and not ledger.is_ready("a")


@pytest.mark.parametrize(("options", "named"), [({"workers": 0}, "workers: 0"), ({"host_pages": -1}, "host_bytes: -")])
def test_sizes_that_cannot_be_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        Bench(Disk({}), **options)
