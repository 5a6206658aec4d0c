"""What is admitted fits (fault 1): the pages that any step of a request sees are counted before it is scheduled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.store.pool.fitting import fitting, most_pages
from mem_triton.store.pool.plan import FOREVER, Attachment, joined
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.payload import PageRun

PAGES = {"a@1": 1, "b@1": 2, "c@1": 3, "d@1": 4}

stretches = st.tuples(st.integers(0, 40), st.one_of(st.integers(1, 20), st.just(FOREVER)))
attachments = st.builds(
    lambda ref, stretch, score: Attachment(ref, stretch[0], min(stretch[0] + stretch[1], FOREVER), score),
    st.sampled_from(sorted(PAGES)),
    stretches,
    st.one_of(st.none(), st.floats(0, 1)),
)
plans = st.lists(attachments, max_size=10).map(tuple)


def brute_force(plan, window: int) -> int:
    parts = joined(plan)
    starts = range(-window, 64)
    return max((sum(PAGES[a.ref] for a in parts if a.first < s + window and a.end > s) for s in starts), default=0)


@given(plans, st.integers(1, 30))
def test_fault01_the_most_pages_of_a_step_are_those_of_the_worst_step(plan, window):
    assert most_pages(plan, PAGES.get, window) == brute_force(plan, window)


@given(plans, st.integers(1, 30), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=200)
def test_fault01_what_is_left_of_a_plan_fits_and_what_was_named_stays(plan, window, table_pages, pool_pages):
    named = tuple(a for a in plan if a.score is None)

    def fits(some) -> bool:
        together = sum(PAGES[ref] for ref in {a.ref for a in some})
        return most_pages(some, PAGES.get, window) <= table_pages and together <= pool_pages

    left = fitting(plan, PAGES.get, window=window, table_pages=table_pages, pool_pages=pool_pages)
    assert tuple(a for a in left if a.score is None) == named
    assert [a for a in plan if any(a is kept for kept in left)] == list(left), "the order stays"
    assert fits(left) or left == named
    if fits(plan):
        assert left == plan


def test_fault01_the_best_reference_of_each_stretch_stays_longest():
    plan = tuple(
        Attachment(ref, 64 * i, 64 * i + 64, score) for i in range(2) for ref, score in (("a@1", 0.9), ("d@1", 0.5))
    )
    left = fitting(plan, PAGES.get, window=512, table_pages=3, pool_pages=100)
    assert {(a.ref, a.first) for a in left} == {("a@1", 0), ("a@1", 64)}


@given(plans, st.integers(1, 30), st.integers(0, 63))
@settings(max_examples=100)
def test_fault01_tables_as_wide_as_the_count_show_every_step(plan, window, start):
    width = max(1, most_pages(plan, PAGES.get, window))
    tables = MemoryTables(slots=1, max_pages=width, page_tokens=4, device=torch.device("cpu"))
    runs = {ref: PageRun(tuple(range(n)), 4 * n) for ref, n in PAGES.items()}
    tables.enter("r", joined(plan), runs)
    tables.set_rows(["r"], [start], [start + window - 1])
    assert int(tables.table.count[0]) <= width


def test_fault01_neighbouring_stretches_of_a_reference_take_its_pages_once():
    plan = tuple(Attachment("b@1", 64 * i, 64 * i + 64, 0.5) for i in range(8))
    assert joined(plan) == (Attachment("b@1", 0, 512, 0.5),)
    assert most_pages(plan, PAGES.get, 512) == 2


def test_fault01_a_row_that_does_not_fit_loses_its_memory_and_its_neighbour_keeps_it():
    tables = MemoryTables(slots=2, max_pages=2, page_tokens=4, device=torch.device("cpu"))
    runs = {"c@1": PageRun((5, 6, 7), 12), "b@1": PageRun((1, 2), 8)}
    for name, ref in (("wide", "c@1"), ("good", "b@1")):
        tables.enter(name, (Attachment(ref),), runs)
    faults: dict[str, Exception] = {}
    tables.set_rows(["wide", "good"], [0, 0], [3, 3], faults)
    assert list(faults) == ["wide"] and "3 memory pages" in str(faults["wide"])
    assert tables.row_slot.tolist()[0] == -1 and int(tables.row_slot[1]) >= 0
    slot = int(tables.row_slot[1])
    assert tables.table.page[slot, :2].tolist() == [1, 2]


@pytest.mark.parametrize("window", [1, 64])
def test_fault01_nothing_named_takes_no_pages(window):
    assert most_pages((), PAGES.get, window) == 0
