"""The host cache of placed pages, the order of copies and steps, and what the counters say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from prometheus_client import REGISTRY

from mem_triton.store import metrics
from mem_triton.store.ledger import PageLedger
from mem_triton.store.streams import HostCopies
from tests.store.tiers_case import SOON, Bench, Disk, block

ONE_PAGE = {f"{name}@1": 4 for name in "abcdef"}


def visit(bench: Bench, *refs: str) -> None:
    """Read each entry and let it go again."""
    for ref in refs:
        bench.ready(ref, "visitor")
        assert bench.holds(ref)
        bench.tiers.release("visitor")


def test_the_host_keeps_what_left_the_device_until_its_bytes_are_spent():
    disk = Disk({**ONE_PAGE, "big@1": 12})
    with Bench(disk, pages=3, host_pages=3) as bench:
        visit(bench, "a@1", "b@1", "c@1", "d@1", "a@1")  # d pushes a out of both tiers: it was used longest ago
        assert disk.loads == {"a@1": 2, "b@1": 1, "c@1": 1, "d@1": 1}
        visit(bench, "big@1")  # all pages of both tiers
        visit(bench, "c@1")
        assert disk.loads["c@1"] == 2 and bench.tiers.stats()["used.host"] == 1


def test_an_entry_larger_than_the_host_cache_is_served_past_it():
    disk = Disk({"big@1": 12, "a@1": 4})
    with Bench(disk, pages=3, host_pages=2) as bench:
        visit(bench, "a@1", "big@1", "a@1")
        assert disk.loads == {"a@1": 1, "big@1": 1} and bench.tiers.stats()["hits.host"] == 1


def test_entries_scattered_over_pages_come_back_whole():
    """Holes of one page in both tiers, then an entry of three pages."""
    disk = Disk({**ONE_PAGE, "long@1": 11})
    with Bench(disk, pages=5, host_pages=5) as bench:
        visit(bench, "a@1", "b@1", "c@1", "d@1", "e@1")
        visit(bench, "b@1", "d@1")  # a, c and e are the oldest now
        visit(bench, "long@1")
        assert bench.tiers.run_of("long@1").pages == (0, 2, 4)
        visit(bench, "a@1", "c@1", "e@1", "long@1")
        assert bench.holds("long@1")


def test_the_host_cache_keeps_quantised_pages_as_they_are():
    disk = Disk({**ONE_PAGE})
    with Bench(disk, pages=1, host_pages=4, dtype=torch.int8) as bench:
        first = []
        for ref in ("a@1", "b@1", "a@1"):
            bench.ready(ref, "r")
            first.append(bench.pool.read([0]))
            bench.tiers.release("r")
        assert disk.loads["a@1"] == 1
        assert all(torch.equal(x, y) for x, y in zip(first[0], first[2], strict=True))
        keys, _ = bench.pool.layout.unpack(first[2], 4)
        true = block("a@1", 4).keys + 1
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
    copies = bench.tiers._fetcher.copies = WrittenDown()
    return copies


def test_a_page_is_overwritten_only_behind_the_steps_queued_when_it_was_released():
    with Bench(Disk(dict(ONE_PAGE)), pages=3) as bench:
        copies = written_down(bench)
        bench.ready("a@1 b@1", "one")
        bench.ready("c@1", "two")
        assert copies.waited_for == [[], [], []], "nobody has read these pages"
        bench.tiers.release("one")  # mark 1
        bench.ready("b@1", "two")
        bench.tiers.release("two")  # mark 2: of c, and of b again
        bench.ready("d@1 e@1 f@1", "three")
        assert copies.waited_for[3:] == [[1], [2], [2]]  # the pages of a, c and b


def test_control_without_marks_the_order_is_lost():
    with Bench(Disk(dict(ONE_PAGE)), pages=1) as bench:
        copies = written_down(bench)
        copies.mark = lambda: None
        visit(bench, "a@1", "b@1")
        assert copies.waited_for == [[], []]


def test_a_failed_fetch_does_not_forget_who_read_the_page_before():
    with Bench(Disk(dict(ONE_PAGE), broken={"b@1"}), pages=1) as bench:
        copies = written_down(bench)
        visit(bench, "a@1")
        assert bench.tiers.request(["b@1"], "bad").wait(SOON) == "failed"
        bench.tiers.release("bad")
        bench.ready("c@1", "r")
        assert copies.waited_for == [[], [1]]


def test_steps_are_ordered_behind_finished_copies_alone_and_behind_each_once():
    with Bench(Disk(dict(ONE_PAGE), gated={"b@1"})) as bench:
        copies = written_down(bench)
        bench.ready("a@1", "r")
        slow = bench.tiers.request(["b@1"], "slow")
        bench.disk.wait_until_loading("b@1")
        bench.tiers.before_step()
        assert copies.joined == ["copy 1"] and slow.state() == "loading"
        bench.tiers.before_step()
        assert copies.joined == ["copy 1"]
        bench.disk.open("b@1")
        assert slow.wait(SOON) == "ready"
        bench.tiers.before_step()
        assert copies.joined == ["copy 1", "copy 2"]


def test_small_host_hits_that_wait_together_are_copied_together():
    """Behind a copy that waits for a long step."""
    with Bench(Disk(dict(ONE_PAGE)), pages=4, host_pages=6) as bench:
        visit(bench, *ONE_PAGE)  # all are on the host, and the last four on the device
        copies, first, go = written_down(bench), threading.Event(), threading.Event()
        run = copies.run

        def slow(copy: Callable[[], None], after) -> str:
            first.set()
            assert go.wait(SOON)
            return run(copy, after)

        copies.run = slow
        tickets = [bench.tiers.request(["a@1"], "one")]
        assert first.wait(SOON)
        tickets += [bench.tiers.request([ref], ref) for ref in ("b@1", "c@1", "d@1")]
        assert [t.state() for t in tickets] == ["loading"] * 4
        go.set()
        assert all(t.wait(SOON) == "ready" for t in tickets)
        assert len(copies.waited_for) == 2 and all(map(bench.holds, ("a@1", "b@1", "c@1", "d@1")))


def test_the_counters_add_up():
    names = ("hits", "misses", "evictions", "bytes")
    samples = [(f"mem_triton:pool_{name}_total", tier) for name in names for tier in ("device", "host", "disk")]

    def now() -> dict[tuple[str, str], float]:
        return {(n, t): REGISTRY.get_sample_value(n, {"tier": t}) or 0.0 for n, t in samples}

    def gauge(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before, fetched = now(), gauge("mem_triton:pool_fetch_seconds_count", tier="host")
    pinned, used = gauge("mem_triton:pool_pinned_pages"), gauge("mem_triton:pool_used_bytes", tier="device")
    with Bench(Disk(dict(ONE_PAGE)), pages=2, host_pages=3) as bench:
        visit(bench, "a@1", "b@1", "a@1", "c@1", "b@1", "d@1")  # device: 1 hit; host: b is a hit
        page = bench.pool.layout.page_bytes
        bench.ready("d@1", "r")
        assert gauge("mem_triton:pool_pinned_pages") - pinned == 1
        assert gauge("mem_triton:pool_used_bytes", tier="device") - used == 2 * page
        stats = bench.tiers.stats()
    expected = {
        "hits.device": 2, "misses.device": 5, "evictions.device": 3, "hits.host": 1, "misses.host": 4,
        "evictions.host": 1, "bytes.host": page, "bytes.disk": 4 * page, "fetched": 5, "used.device": 2,
        "used.host": 3, "pinned.device": 1,
    }  # fmt: skip
    assert stats == expected
    for (name, tier), value in now().items():
        assert value - before[name, tier] == expected.get(f"{name[16:-6]}.{tier}", 0), (name, tier)
    assert gauge("mem_triton:pool_fetch_seconds_count", tier="host") - fetched == 1
    assert gauge("mem_triton:pool_pinned_pages") == pinned, "a closed pool holds nothing"
    assert gauge("mem_triton:pool_used_bytes", tier="device") == used


def test_waiting_requests_are_shown():
    shown = metrics.POOL_WAITING._value.get
    before = shown()
    with Bench(Disk(dict(ONE_PAGE)), pages=1) as bench:
        bench.ready("a@1", "r")
        bench.tiers.request(["b@1"], "waits")
        assert shown() == before + 1
        bench.tiers.release("waits")
        assert shown() == before


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
