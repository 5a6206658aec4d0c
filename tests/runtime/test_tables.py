"""Worker tables of explicit memory: rows follow the batch, and show the pages that the step's positions see."""

from __future__ import annotations

import pytest
import torch

from mem_triton.store.pool.plan import FOREVER, Attachment, joined, seen_between
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.payload import PageRun

P = 4


def carried(*attachments: tuple[str, int, int], **runs: tuple[list[int], int]) -> tuple[tuple, dict]:
    plan = tuple(Attachment(f"{name}@1", first, end) for name, first, end in attachments)
    return joined(plan), {f"{n}@1": PageRun(tuple(pages), t) for n, (pages, t) in runs.items()}


@pytest.fixture
def tables() -> MemoryTables:
    return MemoryTables(slots=3, max_pages=6, page_tokens=P, device=torch.device("cpu"))


def shown(tables: MemoryTables, row: int) -> list[tuple[int, int, int, int]]:
    slot = int(tables.row_slot[row])
    if slot < 0:
        return []
    t, count = tables.table, int(tables.table.count[slot])
    return list(zip(*(x[slot, :count].tolist() for x in (t.page, t.tokens, t.first, t.end)), strict=True))


def test_rows_follow_the_batch_and_pages_have_their_tokens(tables):
    tables.enter("a", *carried(("x", 0, FOREVER), x=([7, 2, 5], 9)))
    tables.enter("plain", (), {})
    tables.set_rows(["plain", "a", "unknown"], [0, 0, 0], [3, 3, 3])
    assert shown(tables, 1) == [(7, 4, 0, FOREVER), (2, 4, 0, FOREVER), (5, 1, 0, FOREVER)]
    assert tables.row_slot[0] == tables.row_slot[2] == -1
    tables.set_rows(["a", "plain"], [4, 4], [4, 4])
    assert len(shown(tables, 0)) == 3 and tables.row_slot[1] == -1 and tables.row_slot[2] == -1


def test_a_step_sees_only_the_pages_of_its_positions(tables):
    chunks = (("x", 0, 64), ("y", 64, 128), ("z", 128, FOREVER))
    tables.enter("a", *carried(*chunks, x=([1], 4), y=([2], 4), z=([3], 4)))
    for first, last, pages in ((0, 63, [1]), (60, 64, [1, 2]), (64, 127, [2]), (0, 300, [1, 2, 3]), (500, 500, [3])):
        tables.set_rows(["a"], [first], [last])
        assert [page for page, *_ in shown(tables, 0)] == pages


def test_a_slot_of_its_predecessor_shows_nothing_of_it(tables):
    tables.enter("a", *carried(("x", 0, FOREVER), x=([7, 2], 8)))
    tables.set_rows(["a"], [0], [0])
    slot = int(tables.row_slot[0])
    tables.leave("a")
    tables._free = [slot]
    tables.enter("b", *carried(("y", 10, FOREVER), y=([5], 4)))
    tables.set_rows(["b"], [0], [3])
    assert int(tables.row_slot[0]) == slot and shown(tables, 0) == []
    tables.leave("b")
    tables.clear_rows()
    assert tables.row_slot.tolist() == [-1, -1, -1]


def test_addresses_never_change_so_that_a_captured_graph_sees_every_step(tables):
    tensors = [*tables.table[:5], tables.row_slot, tables.sink_first, tables.sink_end]
    before = [t.data_ptr() for t in tensors]
    tables.enter("a", *carried(("x", 0, FOREVER), x=([7, 2], 8)))
    tables.set_rows(["a"], [0], [0])
    assert before == [t.data_ptr() for t in tensors] and tables.row_slot[0] >= 0


def test_an_attachment_that_came_back_after_preemption_is_shown_again(tables):
    words = carried(("x", 0, FOREVER), x=([7], 4))
    tables.enter("a", *words)
    tables.set_rows(["a"], [0], [9])
    tables.leave("a")
    tables.set_rows(["other"], [0], [0])
    tables.enter("a", *words)
    tables.set_rows(["other", "a"], [1, 0], [1, 3])
    assert [page for page, *_ in shown(tables, 1)] == [7]


def test_more_pages_than_the_table_holds_is_an_error_not_a_cut(tables):
    tables.enter("a", *carried(("x", 0, FOREVER), x=([1, 2, 3, 4, 5, 6, 7], 28)))
    with pytest.raises(RuntimeError, match="7 memory pages are seen in one step, the tables hold 6"):
        tables.set_rows(["a"], [0], [0])


def test_a_block_key_names_what_the_block_saw_and_which_part_of_it():
    plan = (Attachment("a@1", 0, 64), Attachment("b@1", 64, 128), Attachment("c@2"))
    assert seen_between(plan, 0, 32) == ("a@1", "c@2")
    assert seen_between(plan, 48, 80) == ("a@1[0:16]", "b@1[16:32]", "c@2")
    assert seen_between(plan, 128, 160) == ("c@2",)
    assert seen_between(tuple(reversed(plan)), 48, 80) == seen_between(plan, 48, 80), "order is no part of it"
    shorter = (Attachment("a@1", 0, 64), Attachment("b@1", 64, FOREVER), Attachment("c@2"))
    assert seen_between(shorter, 64, 96) == seen_between(plan, 64, 96), "what comes after a block is no part of it"
