"""The pool's book-keeping: pins hold, evictions make room, nobody waits for another's load, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mem_triton.store.pool.ledger import PageLedger
from mem_triton.store.pool.residency import PoolCapacityError, Residency


def fill(residency: Residency) -> list[str]:
    """Have the workers load everything that is asked of them."""
    refs = [load.ref for load in residency.take_loads()]
    for ref in refs:
        residency.loaded(ref)
    return refs


def test_a_request_is_ready_when_its_pages_are_filled():
    residency = Residency(num_pages=8, page_tokens=4)
    ticket = residency.request("r", {"a@1": 9, "b@1": 4})
    assert ticket.state == "loading" and len(ticket.pages["a@1"]) == 3 and len(ticket.pages["b@1"]) == 1
    a, b = residency.take_loads()
    assert residency.take_loads() == [], "each load is ordered once"
    residency.loaded(a.ref)
    assert ticket.state == "loading"
    residency.loaded(b.ref)
    assert ticket.state == "ready"


def test_loads_that_could_not_be_told_come_again_once_and_before_newer_ones():
    residency = Residency(num_pages=8, page_tokens=4)
    residency.request("r", {"a@1": 9})
    untold = residency.take_loads()
    residency.request("s", {"b@1": 4})
    residency.put_back(untold)
    residency.put_back(untold)
    assert [load.ref for load in residency.take_loads()] == ["a@1", "b@1"] and residency.take_loads() == []


def test_a_hit_is_ready_at_once_while_another_load_is_under_way():
    residency = Residency(8, 4)
    residency.request("first", {"a@1": 4})
    fill(residency)
    slow = residency.request("slow", {"b@1": 4})
    hit = residency.request("hit", {"a@1": 4})
    assert hit.state == "ready" and slow.state == "loading"


def test_two_requests_share_one_load_and_one_run_of_pages():
    residency = Residency(8, 4)
    one, two = residency.request("one", {"a@1": 8}), residency.request("two", {"a@1": 8})
    assert one.pages == two.pages
    assert fill(residency) == ["a@1"]
    assert one.state == two.state == "ready"


def test_the_least_recently_used_free_entry_makes_room():
    residency = Residency(3, 4)
    for name in "abc":
        residency.request(name, {f"{name}@1": 4})
        fill(residency)
        residency.release(name)
    residency.request("again", {"a@1": 4})  # now b is the oldest
    residency.release("again")
    residency.request("d", {"d@1": 4})
    assert fill(residency) == ["d@1"]
    assert residency.request("x", {"a@1": 4, "c@1": 4}).state == "ready"


def test_pinned_pages_stay_and_the_newcomer_waits_for_them():
    residency = Residency(2, 4)
    running = residency.request("running", {"a@1": 8})
    fill(residency)
    newcomer = residency.request("newcomer", {"b@1": 4})
    assert newcomer.state == "waiting" and residency.take_loads() == []
    assert running.state == "ready" and residency.request("hit", {"a@1": 8}).state == "ready"
    residency.release("running")
    assert newcomer.state == "waiting", "the hit still holds the pages"
    residency.release("hit")
    assert newcomer.state == "loading" and fill(residency) == ["b@1"]


def test_control_without_pins_a_running_request_loses_its_pages(monkeypatch):
    monkeypatch.setattr(PageLedger, "_may_go", staticmethod(lambda entry: entry.ready))
    residency = Residency(2, 4)
    running = residency.request("running", {"a@1": 8})
    fill(residency)
    newcomer = residency.request("newcomer", {"b@1": 4})
    assert newcomer.state == "loading" and set(newcomer.pages["b@1"]) <= set(running.pages["a@1"])


def test_waiting_is_first_come_first_served():
    residency = Residency(4, 4)
    residency.request("running", {"a@1": 12})
    fill(residency)
    big, small = residency.request("big", {"b@1": 8}), residency.request("small", {"c@1": 4})
    assert (big.state, small.state) == ("waiting", "waiting"), "a small one may not overtake for ever"
    residency.release("running")
    assert (big.state, small.state) == ("loading", "loading")


def test_what_never_fits_is_refused_at_once_and_says_what_to_change():
    residency = Residency(4, 4)
    with pytest.raises(PoolCapacityError, match=r"needs 5 memory pages, the pool has 4.*pool_gib"):
        residency.request("r", {"a@1": 17})
    residency.pin({"default@1": 8})
    with pytest.raises(PoolCapacityError, match="needs 3 memory pages, the pool has 2"):
        residency.request("r", {"a@1": 12})
    assert residency.request("r", {"a@1": 8, "default@1": 8}).state == "loading", "the pinned entry needs no room"


def test_a_failed_load_fails_who_needs_it_and_can_be_tried_again():
    residency = Residency(4, 4)
    bad, good = residency.request("bad", {"a@1": 4, "b@1": 4}), residency.request("good", {"b@1": 4})
    residency.take_loads()
    residency.failed("a@1", "disk on fire")
    residency.loaded("b@1")
    assert bad.state == "failed: a@1: disk on fire" and good.state == "ready"
    residency.release("bad")
    assert residency.request("again", {"a@1": 4}).state == "loading"
    assert fill(residency) == ["a@1"]


def test_a_request_that_leaves_while_loading_leaves_no_half_filled_page_to_others():
    residency = Residency(1, 4)
    residency.request("gone", {"a@1": 4})
    (load,) = residency.take_loads()
    residency.release("gone")
    waiting = residency.request("next", {"b@1": 4})
    assert waiting.state == "waiting", "the workers still write into that page"
    residency.loaded(load.ref)
    assert waiting.state == "loading"


class Pool(RuleBasedStateMachine):
    """Any order of requests, loads, failures and releases."""

    def __init__(self) -> None:
        super().__init__()
        self.residency, self.owners, self.count = Residency(6, 4), {}, 0
        self.ordered: list[str] = []

    @rule(refs=st.sets(st.sampled_from("abcde"), min_size=1, max_size=3))
    def request(self, refs: set[str]) -> None:
        self.count += 1
        owner = f"r{self.count}"
        self.owners[owner] = self.residency.request(owner, {f"{r}@1": 4 * (1 + "abcde".index(r) % 2) for r in refs})

    @rule(which=st.integers(0, 10))
    def release(self, which: int) -> None:
        if self.owners:
            owner = sorted(self.owners)[which % len(self.owners)]
            del self.owners[owner]
            self.residency.release(owner)

    @rule(ok=st.booleans())
    def load(self, ok: bool) -> None:
        self.ordered += [load.ref for load in self.residency.take_loads()]
        if self.ordered:
            ref = self.ordered.pop(0)
            self.residency.loaded(ref) if ok else self.residency.failed(ref, "no")

    @invariant()
    def no_page_has_two_entries_and_none_is_lost(self) -> None:
        ledger = self.residency._ledger
        pages = [page for entry in ledger.entries.values() for page in entry.pages]
        assert sorted(pages + ledger._free) == list(range(6))

    @invariant()
    def who_holds_pages_still_has_them(self) -> None:
        for ticket in self.owners.values():
            if ticket.state in ("ready", "loading"):
                for ref, pages in ticket.pages.items():
                    assert self.residency._ledger.entries[ref].pages == pages

    @invariant()
    def nobody_waits_while_there_is_room(self) -> None:
        waiting = [t for t in self.owners.values() if t.state == "waiting"]
        if waiting and not any(t.state == "loading" for t in self.owners.values()):
            held = {r for t in self.owners.values() if t.state != "waiting" for r in t.tokens}  # a failed one, too
            loading = [e for e in self.residency._ledger.entries.values() if not e.ready]
            if not held and not loading:
                raise AssertionError("everything is free, and somebody waits")


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=25, derandomize=True, deadline=None)
