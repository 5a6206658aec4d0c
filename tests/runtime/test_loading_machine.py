"""Any order of requests, loads, failures and releases: what must hold at every moment.

Hypothesis takes the place of the loader's threads, so that every run is the same; a second test lets real threads run.
"""

from __future__ import annotations

import queue
import random
import threading

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mem_triton.store.pool import loader as module
from mem_triton.store.pool.fetching import Fetcher
from mem_triton.store.pool.ledger import PageLedger
from mem_triton.store.pool.residency import PoolCapacityError, Residency, Ticket
from tests.runtime.loading_case import PAGE, Bench, Disk

REFS = {f"{name}@1": PAGE * (1 + i % 3) - i % 2 for i, name in enumerate("abcdefg")}  # of one to three pages
PAGES, HOST_PAGES = 5, 4


class Stepped(Fetcher):
    """A fetcher whose threads do nothing: ``step`` is one fetch from its begin to its end."""

    def _work(self, source: queue.SimpleQueue) -> None:
        return

    def step(self, from_host: bool) -> bool:
        first, second = self._host_queue, self._disk_queue
        for source in (first, second) if from_host else (second, first):
            if not source.empty():
                self._do([source.get()])
                return True
        return False


class Machine(RuleBasedStateMachine):
    """Seven entries of up to three pages, five pages on the device and four on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(dict(REFS))
        module.Fetcher, real = Stepped, module.Fetcher
        try:
            self.bench = Bench(self.disk, PAGES, HOST_PAGES, workers=1)
        finally:
            module.Fetcher = real
        self.residency, self.fetcher = self.bench.residency, self.bench.loader._fetcher
        self.tickets: dict[str, Ticket] = {}
        self.pages: dict[tuple[str, str], tuple[int, ...]] = {}  # (owner, entry) -> where it was when it became ready
        self.count = 0

    def teardown(self) -> None:
        self.bench.loader.close()

    @rule(refs=st.sets(st.sampled_from(sorted(REFS)), min_size=1, max_size=3))
    def request(self, refs: set[str]) -> None:
        self.count += 1
        owner = f"r{self.count}"
        try:
            self.tickets[owner] = self.bench.request(" ".join(sorted(refs)), owner)
        except PoolCapacityError:
            assert sum(-(-REFS[ref] // PAGE) for ref in refs) > PAGES

    @rule(which=st.integers(0, 10))
    def release(self, which: int) -> None:
        if self.tickets:
            owner = sorted(self.tickets)[which % len(self.tickets)]
            del self.tickets[owner]
            self.residency.release(owner)
            self.pages = {key: pages for key, pages in self.pages.items() if key[0] != owner}
            self.bench.call()

    @rule(from_host=st.booleans(), broken=st.sets(st.sampled_from(sorted(REFS)), max_size=2))
    def load(self, from_host: bool, broken: set[str]) -> None:
        self.disk.broken = broken
        self.fetcher.step(from_host)

    @rule()
    def the_front_end_asks(self) -> None:
        self.bench.call()

    @rule(which=st.integers(0, 10))
    def load_while_somebody_leaves(self, which: int) -> None:
        self.disk.broken, self.disk.meanwhile = set(), lambda: self.release(which)
        self.fetcher.step(from_host=False)
        self.disk.meanwhile = lambda: None

    @rule()
    def load_all(self) -> None:
        self.disk.broken = set()
        while self.fetcher.step(False):
            self.bench.call()

    @invariant()
    def no_page_has_two_entries_and_none_is_lost(self) -> None:
        for ledger in (self.residency._ledger, self.fetcher._host):
            taken = [page for entry in ledger.entries.values() for page in entry.pages]
            assert sorted(taken + ledger._free) == list(range(ledger.num_pages))
            idle = sum(len(ledger.entries[ref].pages) for ref in ledger._idle)
            assert ledger.idle_pages == idle and ledger.room() == ledger.num_pages - sum(
                len(e.pages) for e in ledger.entries.values() if e.owners or not e.ready
            )

    @invariant()
    def what_is_owned_stays_where_it_is_and_what_it_is(self) -> None:
        for owner, ticket in self.tickets.items():
            if ticket.state == "ready":
                for ref in ticket.tokens:
                    run = self.bench.run_of(ref)
                    assert self.pages.setdefault((owner, ref), run) == run == ticket.pages[ref]
                    assert self.bench.holds(ref)

    @invariant()
    def states_tell_the_truth(self) -> None:
        device, waiting = self.residency._ledger, self.residency._waiting
        for owner, ticket in self.tickets.items():
            there = [ref for ref in ticket.tokens if ref in device.entries]
            if ticket.state in ("ready", "loading"):
                assert all(owner in device.entries[ref].owners for ref in ticket.tokens)
                assert all(map(device.is_ready, ticket.tokens)) == (ticket.state == "ready")
            elif ticket.state == "waiting":
                missing = sum(-(-n // PAGE) for ref, n in ticket.tokens.items() if ref not in there)
                assert ticket in waiting and missing
                assert ticket is not waiting[0] or missing > device.room(besides=there), "there is room for the first"
            else:
                assert "disk on fire" in ticket.state
        assert all(ticket in self.tickets.values() for ticket in waiting)

    @invariant()
    def each_entry_is_read_once_while_it_is_there(self) -> None:
        stats = self.bench.loader.stats()
        get = lambda *names: sum(stats.get(name, 0) for name in names)  # noqa: E731
        under_way = self.fetcher._host_queue.qsize() + self.fetcher._disk_queue.qsize()
        assert get("hits.host", "misses.host") == get("fetched", "failed") + under_way
        assert get("misses.host") == sum(self.disk.loads.values()) + self.fetcher._disk_queue.qsize()
        assert under_way <= sum(not entry.ready for entry in self.residency._ledger.entries.values())

    @precondition(lambda self: not self.tickets)
    @invariant()
    def with_no_owner_nothing_is_pinned(self) -> None:
        assert self.residency._ledger.pinned_pages == 0 and not self.residency._waiting


SETTINGS = settings(max_examples=60, stateful_step_count=25, derandomize=True, deadline=None, print_blob=False)
TestMachine = Machine.TestCase
TestMachine.settings = SETTINGS


def _room_for_all(self: Residency, ticket: Ticket) -> bool:
    """As ``_admit``, had it looked only at the entries that are filled, not at those under way."""
    entries = self._ledger.entries
    self._ledger.entries = {ref: entry for ref, entry in entries.items() if entry.ready}
    try:
        return _ADMIT(self, ticket)
    finally:
        self._ledger.entries = entries | self._ledger.entries


_ADMIT = Residency._admit


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (PageLedger, "_may_go", staticmethod(lambda entry: entry.ready)),  # pins do not hold
        (PageLedger, "_may_go", staticmethod(lambda entry: not entry.owners)),  # pages that are being filled are free
        (Residency, "_admit", _room_for_all),  # loads are not shared
        (PageLedger, "unpin", lambda self, ref, owner: False),  # releases are lost
        (PageLedger, "fill", lambda self, ref: setattr(self.entries[ref], "ready", True)),  # none may ever go
    ],
)
def test_control_the_machine_finds_what_is_broken(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Exception):  # noqa: B017 - any of the invariants, or a KeyError on the way
        run_state_machine_as_test(Machine, settings=settings(SETTINGS, phases=[Phase.generate]))  # not made shorter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_threads_read_what_they_own(dtype):
    """Eight owners at once on five pages, each with 25 requests: what they own is theirs until they let it go."""
    with Bench(Disk(dict(REFS)), PAGES, HOST_PAGES, workers=3, dtype=dtype) as bench:
        problems: list[str] = []

        def live(number: int) -> None:
            pick = random.Random(number)
            for i in range(25):
                refs, owner = pick.sample(sorted(REFS), pick.randint(1, 2)), f"{number}.{i}"
                try:
                    ticket = bench.request(" ".join(refs), owner)
                except PoolCapacityError:
                    continue
                if bench.wait(ticket) != "ready":
                    problems.append(f"{owner} {refs}: {ticket.state}")
                for ref in refs * 3:
                    if not bench.holds(ref):
                        problems.append(f"{owner}: {ref} is not what it was")
                bench.residency.release(owner)

        threads = [threading.Thread(target=live, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not problems and not any(thread.is_alive() for thread in threads)
        assert bench.residency._ledger.pinned_pages == 0 and bench.residency._ledger.evictions > 20
        assert bench.loader.stats()["evictions.host"] > 5
