"""A front end tells requests that read several trained entries that these were not trained together."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.pool.residency import Residency
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.trained import TRAINED
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from tests.store.bank_case import TOKENS, block, spec


@pytest.fixture
def front(tmp_path):
    front = object.__new__(ExplicitFrontEnd)  # no engine
    with Bank.create(tmp_path / "bank", spec()) as bank:
        front.bank, front._default, front.section = bank, (), MemorySection(bank=str(tmp_path / "bank"))
        front.residency = Residency(8, TOKENS, 1)
        front.layout, front.longest_step, front.obstacle = SimpleNamespace(max_pages=8), 512, None
        front.max_model_len, front._said, front._logger = 4096, set(), logging.getLogger("trained")
        about = {TRAINED: {"form": "cartridge"}}
        bank.add([NewEntry(name, name, block(i), metadata=about) for i, name in enumerate(("one", "two"))])
        bank.add([NewEntry("text", "a text", block(5))])
        yield front


def note(front: ExplicitFrontEnd, *ids: str) -> str | None:
    reading = front.admit(parse_request({"mem_ids": list(ids)}).systems["memory"], RequestParams())
    return reading.report().get("trained")


def test_several_trained_entries_are_allowed_and_said(front, caplog):
    with caplog.at_level(logging.WARNING):
        assert note(front, "one") is None and note(front, "one", "text") is None and note(front, "one", "one@1") is None
        assert caplog.records == []
        for _ in range(2):
            assert note(front, "two", "text", "one").startswith("two@1, one@1 were not trained together")
    assert len(caplog.records) == 1 and "not trained together" in caplog.text, "the log says it once"
