"""Default entries outlive their deletion (fault 10): pinned by version, served on, and said."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mem_triton.config import ConfigError
from mem_triton.store.bank import Bank, UnknownEntryError
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.registry import parse_request
from tests.store.bank_case import TOKENS, entry, spec


@pytest.fixture
def bank(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("alice", 1), entry("bob", 2)])
        yield bank


def front(bank: Bank, *default: str, pages: int = 4) -> ExplicitFrontEnd:
    front = object.__new__(ExplicitFrontEnd)  # no engine
    front.bank, front.section = bank, SimpleNamespace(default=default, retrieval=None)
    front.residency, front.layout = Residency(pages, TOKENS), SimpleNamespace(max_pages=pages, num_pages=pages)
    front.longest_step, front.max_model_len, front._logger = 512, 4096, logging.getLogger("test")
    front._default = front._pin_default()
    return front


def test_fault10_a_running_server_serves_the_version_it_pinned(bank):
    explicit = front(bank, "alice")
    bank.update("alice", entry("alice", 3))
    bank.delete("alice")
    for _ in range(2):
        refs = explicit._resolve(parse_request({}).systems["memory"])
        assert list(refs) == ["alice@1"]
        reading = Reading(ReadingRequest(), tokens=dict(refs))
        explicit.claim(reading)
        explicit.close(reading)
    assert bank.load("alice@1", deleted=True).tokens == TOKENS, "workers may still read it"
    with pytest.raises(UnknownEntryError):
        bank.load("alice@1")


def test_fault10_a_restart_leaves_a_deleted_entry_out_and_warns(bank, caplog):
    bank.delete("alice")
    bank.compact()
    assert list(front(bank, "alice", "bob")._default) == ["bob@1"]
    assert 'served without "alice"' in caplog.text


def test_fault10_a_name_that_never_was_is_refused_at_start(bank):
    with pytest.raises(ConfigError, match=r"memory\.default.*allice"):
        front(bank, "allice")


def test_fault10_a_default_entry_whose_data_is_gone_is_left_out_from_then_on(bank, caplog):
    explicit = front(bank, "alice", "bob")
    (load, _) = explicit.residency.take_loads()
    reading = Reading(ReadingRequest(), tokens=dict(explicit._default))
    reading.plan = ()
    reading.tickets.append(explicit.residency.request("r", dict(explicit._default)))
    explicit.residency.failed(load.ref, "the shard is missing")
    explicit.close(reading)
    assert list(explicit._default) == ["bob@1"] and "cannot be read any more" in caplog.text
    assert list(explicit._resolve(parse_request({}).systems["memory"])) == ["bob@1"]


def test_fault01_default_entries_that_no_request_could_read_are_refused_at_start(bank):
    explicit = front(bank, "alice", pages=1)
    assert list(explicit._default) == ["alice@1"]
    with pytest.raises(ConfigError, match=r"memory\.default: need 2 memory pages"):
        front(bank, "alice", "bob", pages=1)
