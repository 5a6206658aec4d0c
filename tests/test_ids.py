"""One grammar of ids and tenants: what a bank takes, requests can name, and the other way round."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton import ids
from mem_triton.store.bank import Bank, BankError, NewEntry
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.store.bank_case import entry, spec

NAMES = [
    "a",
    "A.b_c-d:e/f",
    "7",
    "a" * 128,
    "a//b",
    "a/../b",
    "a.",
    "",
    ".notes",
    "/abs",
    "-x",
    ":x",
    "_x",
    "a b",
    "a\n",
    "ä",
    "数",
    "a@1",
    "a#0",
    "a" * 129,
    "\ud800",
    "a\x00",
    "acme corp",
    "٣",
]


def asked(**words) -> bool:
    try:
        parse_request(words)
        return True
    except RequestError:
        return False


@pytest.mark.parametrize("name", NAMES)
def test_fault25_what_a_bank_takes_a_request_can_name(tmp_path, name):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        taken = []
        for new in (entry(name, 1), entry("other", 2, tenant=name)):
            try:
                bank.add([new])
                taken.append(True)
            except BankError as error:
                assert "\n" not in str(error)
                taken.append(False)
    assert taken[0] == asked(mem_capture=name) == ids.is_id(name)
    assert taken[1] == asked(mem_tenant=name) and (name == "" or taken[1] == ids.is_name(name))
    if "@" not in name and "#" not in name:
        assert taken[0] == asked(mem_ids=[name])


@pytest.mark.parametrize("word", ["a@1", "a@0", "a@01", "a@999999999", "a@9999999999", "a@٣", "a@", "a@1@1", "@1"])
def test_fault25_references_are_the_same_for_banks_and_requests(tmp_path, word):
    reference = ids.split_reference(word)
    assert (reference is not None) == asked(mem_ids=[word])
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([NewEntry("a", "text")])
        assert bank.knows(word) == (reference == ("a", 1))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=200), st.text(max_size=200))
def test_fault25_every_name_becomes_an_id(one, other):
    first, second = ids.id_from(one), ids.id_from(other)
    assert first == "" or ids.is_id(first)
    if not (one + other).isascii() and "/" not in one + other and len(first + second) < 100:
        beyond = ["".join(c for c in ids.composed(name) if ord(c) > 127) for name in (one, other)]
        assert first != second or beyond[0] == beyond[1], "letters of other scripts are told apart"


@pytest.mark.parametrize("name", ["Zürich", "第一章", "กี่", "हिन्दी", "😀", "Привет"])
def test_fault25_a_name_of_another_script_can_be_read_back(name):
    id = ids.id_from(name)
    assert ids.is_id(id) and id.removeprefix(ids.ENCODED).encode().decode("punycode") == name
    assert ids.id_from(f"docs/{name} (1)").startswith("docs/" + ids.ENCODED)
