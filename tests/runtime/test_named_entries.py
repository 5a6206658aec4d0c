"""Entries that a request names: each once, whatever it is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.bank.documents import reference_id
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.store.bank_case import TOKENS, block, entry, spec


@pytest.fixture
def front(tmp_path):
    front = object.__new__(ExplicitFrontEnd)  # no engine
    with Bank.create(tmp_path / "bank", spec()) as bank:
        front.bank, front._default = bank, ()
        front._logger = None
        front.residency = Residency(8, TOKENS, 1)
        front.layout, front.longest_step = SimpleNamespace(max_pages=2), 512
        yield front


def resolved(front: ExplicitFrontEnd, *ids: str) -> tuple[str, ...]:
    return tuple(front._resolve(parse_request({"mem_ids": list(ids)}).systems["memory"]))


def test_fault25_an_entry_that_is_named_twice_takes_its_pages_once(front):
    front.bank.add([entry("alice", 1), entry("bob", 2), entry("carol", 3)])
    assert resolved(front, "alice", "alice@1", "bob", "bob@1") == ("alice@1", "bob@1")
    with pytest.raises(RequestError, match="need 3 memory pages, a request may use 2"):
        resolved(front, "alice", "bob", "carol")


def test_fault25_a_request_names_references_of_a_document_in_order(front):
    for start in (64, 0):
        id = reference_id("guide", f"{start:012x}")
        front.bank.add([NewEntry(id, f"at {start}", block(start), metadata={"start": start})])
    first, second = "guide:000000000000@1", "guide:000000000040@1"
    assert resolved(front, "guide#*") == (first, second)
    assert resolved(front, "guide#1", "guide#0", "guide#*") == (second, first)
    with pytest.raises(RequestError, match="#0 to #1"):
        resolved(front, "guide#2")


def test_fault29_an_entry_without_keys_and_values_is_refused_before_it_runs(front):
    front.bank.add([NewEntry("cold", "text alone")])
    with pytest.raises(RequestError, match='"cold" has text but no keys and values yet'):
        resolved(front, "cold")
