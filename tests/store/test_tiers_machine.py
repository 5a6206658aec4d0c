"""Any order of requests, fetches, failures and releases: what must hold at every moment.

Hypothesis takes the place of the fetcher's threads, so that every run is the same; a second test lets real threads run.
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

from mem_triton.store import tiers as module
from mem_triton.store.fetching import Fetcher
from mem_triton.store.ledger import PageLedger
from mem_triton.store.tiers import MemoryTiers, PoolCapacityError, Ticket
from tests.store.tiers_case import PAGE, SOON, Bench, Disk

REFS = {f"{name}@1": PAGE * (1 + i % 3) - i % 2 for i, name in enumerate("abcdefg")}  # of one to three pages
OWNERS = ("one", "two", "three")
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
    """Three owners, seven entries of up to three pages, five pages on the device and four on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(dict(REFS))
        module.Fetcher, real = Stepped, module.Fetcher
        try:
            self.bench = Bench(self.disk, PAGES, HOST_PAGES, workers=1)
        finally:
            module.Fetcher = real
        self.tiers, self.fetcher = self.bench.tiers, self.bench.tiers._fetcher
        self.tickets: dict[str, list[Ticket]] = {owner: [] for owner in OWNERS}
        self.pages: dict[tuple[str, str], tuple[int, ...]] = {}  # (owner, entry) -> where it was when it became ready

    def teardown(self) -> None:
        self.tiers.close()

    def owned(self) -> list[tuple[str, Ticket]]:
        return [(owner, ticket) for owner, tickets in self.tickets.items() for ticket in tickets]

    @rule(refs=st.sets(st.sampled_from(sorted(REFS)), min_size=1, max_size=3), owner=st.sampled_from(OWNERS))
    def request(self, refs: set[str], owner: str) -> None:
        try:
            self.tickets[owner].append(self.tiers.request(sorted(refs), owner))
        except PoolCapacityError as error:
            assert error.needed > error.available

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        self.tiers.release(owner)
        self.tickets[owner].clear()
        self.pages = {key: pages for key, pages in self.pages.items() if key[0] != owner}

    @rule(from_host=st.booleans(), broken=st.sets(st.sampled_from(sorted(REFS)), max_size=2))
    def fetch(self, from_host: bool, broken: set[str]) -> None:
        self.disk.broken = broken
        self.fetcher.step(from_host)

    @rule(leaves=st.sampled_from(OWNERS))
    def fetch_while_somebody_leaves(self, leaves: str) -> None:
        self.disk.broken, self.disk.meanwhile = set(), lambda: self.release(leaves)
        self.fetcher.step(from_host=False)
        self.disk.meanwhile = lambda: None

    @rule()
    def fetch_all(self) -> None:
        self.disk.broken = set()
        while self.fetcher.step(False):
            pass

    @invariant()
    def no_page_has_two_entries_and_none_is_lost(self) -> None:
        for ledger in (self.tiers._device, self.fetcher._host):
            taken = [page for entry in ledger.entries.values() for page in entry.pages]
            assert sorted(taken + ledger._free) == list(range(ledger.num_pages))
            idle = sum(len(ledger.entries[ref].pages) for ref in ledger._idle)
            assert ledger.idle_pages == idle and ledger.room() == ledger.num_pages - sum(
                len(e.pages) for e in ledger.entries.values() if e.owners or not e.ready
            )

    @invariant()
    def what_is_owned_stays_where_it_is_and_what_it_is(self) -> None:
        for owner, ticket in self.owned():
            if ticket.state() == "ready":
                for ref in ticket.sizes:
                    run = self.tiers.run_of(ref)
                    assert self.pages.setdefault((owner, ref), run.pages) == run.pages
                    assert self.bench.holds(ref)

    @invariant()
    def states_tell_the_truth(self) -> None:
        device, head = self.tiers._device, (self.tiers._waiting or [None])[0]
        for owner, ticket in self.owned():
            there = [ref for ref in ticket.sizes if ref in device.entries]
            mine = [ref for ref in there if owner in device.entries[ref].owners]
            state = ticket.state()
            if state in ("ready", "loading"):
                assert mine == list(ticket.sizes) and all(map(device.is_ready, mine)) == (state == "ready")
            elif state == "waiting":
                missing = sum(-(-n // PAGE) for ref, n in ticket.sizes.items() if ref not in there)
                assert ticket in self.tiers._waiting and missing
                assert ticket is not head or missing > device.room(besides=there), "there is room for who comes first"
            else:
                assert "disk on fire" in ticket.error
        assert all(ticket in [t for _, t in self.owned()] for ticket in self.tiers._waiting)

    @invariant()
    def the_counts_add_up(self) -> None:
        stats = self.tiers.stats()
        under_way = sum(not entry.ready for entry in self.tiers._device.entries.values())
        get = lambda *names: sum(stats.get(name, 0) for name in names)  # noqa: E731
        assert get("misses.device") == get("hits.host", "misses.host")
        assert get("misses.device") == get("fetched", "failed", "abandoned") + under_way
        assert get("fetched") == get("evictions.device") + sum(e.ready for e in self.tiers._device.entries.values())
        assert get("used.device") == PAGES - self.tiers._device.free_pages
        assert get("misses.host") >= sum(self.disk.loads.values()) >= get("misses.host") - get("abandoned") - under_way

    @precondition(lambda self: not any(self.tickets.values()))
    @invariant()
    def with_no_owner_nothing_is_pinned(self) -> None:
        assert self.tiers.stats()["pinned.device"] == 0 and not self.tiers._waiting


SETTINGS = settings(max_examples=60, stateful_step_count=25, derandomize=True, deadline=None, print_blob=False)
TestMachine = Machine.TestCase
TestMachine.settings = SETTINGS


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (PageLedger, "_may_go", staticmethod(lambda entry: entry.ready)),  # pins do not hold
        (PageLedger, "_may_go", staticmethod(lambda entry: not entry.owners)),  # pages that are being filled are free
        (MemoryTiers, "_is_coming", lambda self, ref: self._device.is_ready(ref)),  # fetches are not shared
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
                    ticket = bench.tiers.request(refs, owner)
                except PoolCapacityError:
                    continue
                if ticket.wait(SOON) != "ready":
                    problems.append(f"{owner} {refs}: {ticket.state()} {ticket.error}")
                for ref in refs * 3:
                    bench.tiers.before_step()
                    if not bench.holds(ref):
                        problems.append(f"{owner}: {ref} is not what it was")
                bench.tiers.release(owner)

        threads = [threading.Thread(target=live, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        stats = bench.tiers.stats()
        assert not problems and not any(thread.is_alive() for thread in threads)
        assert stats["pinned.device"] == 0 and stats["evictions.device"] > 20 and stats["evictions.host"] > 5
