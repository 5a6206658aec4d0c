"""The denylist: its entries hit configurations that the tables choose, what runs instead is not denied, and is said."""

from __future__ import annotations

import itertools
import logging
import re

import pytest

from mem_triton import compat
from mem_triton.ops import denylist
from mem_triton.ops.denylist import ENTRIES, Entry, allowed, denials
from mem_triton.ops.tuning.memory_attention import select_pages, select_shared
from mem_triton.ops.tuning.memory_attention_fused import select

SELECTS = {"attention": select, "shared": select_shared, "pages": select_pages}
SHAPES = list(itertools.product(SELECTS, (64, 80, 128, 256), (2, 4), (4, 64, 256, 8192)))  # kernel, size, item, rows
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def hit(entry: Entry, triton: str) -> list[tuple]:
    return [
        (kernel, architecture, size, item, rows)
        for architecture in entry.architectures
        for kernel, size, item, rows in SHAPES
        if entry.hits(triton, architecture, kernel, size, SELECTS[kernel](architecture, size, item, rows))
    ]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_hits_something_and_names_its_issue(entry: Entry):
    assert any(hit(entry, triton) for triton in VERSIONS), "a dead entry"
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", entry.issue)
    assert compat.lies_in("3.6.0", entry.triton), "tested versions begin there"


@pytest.mark.parametrize("triton", VERSIONS)
def test_what_runs_is_never_denied(triton: str):
    architectures = ("sm80", "sm90", "sm100", "gfx942")
    for architecture, (kernel, size, item, rows) in itertools.product(architectures, SHAPES):
        config = allowed(kernel, SELECTS[kernel], architecture, size, item, rows, triton=triton)
        assert not any(e.hits(triton, architecture, kernel, size, config) for e in ENTRIES), (architecture, kernel)


def test_an_entry_without_an_alternative_would_be_seen(monkeypatch):
    """Negative control: an entry that denies every tile leaves nothing to run."""
    everything = Entry("all", ">=3.6", ("sm90",), ("attention",), "", "", block_m=1)
    monkeypatch.setattr(denylist, "ENTRIES", (everything,))
    allowed.cache_clear()
    with pytest.raises(ValueError, match="nothing that may run"):
        allowed("attention", select, "sm90", 128, 2, 8192, triton="3.6.0")
    allowed.cache_clear()


def test_hopper_keeps_one_warp_group_until_triton_3_9():
    prefill = ("shared", select_shared, "sm90", 128, 2, 8192)
    assert (allowed(*prefill, triton="3.9.0").block_m, allowed(*prefill, triton="3.9.0").warps) == (128, 8)
    assert (allowed(*prefill, triton="3.7.1").block_m, allowed(*prefill, triton="3.7.1").warps) == (64, 4)
    assert allowed("attention", select, "sm90", 256, 2, 256, triton="3.7.1").block_m == 32
    decode = ("attention", select, "sm90", 128, 2, 4)
    assert allowed(*decode, triton="3.6.0") == select("sm90", 128, 2, 4)


def test_blackwell_multiplies_synchronously_where_tcgen05_is_wrong():
    odd, even = (("attention", select, "sm100", size, 2, 256) for size in (80, 128))
    assert [allowed(*odd, triton=v).block_m for v in VERSIONS] == [32, 32, 32, 64]
    assert [allowed(*even, triton=v).block_m for v in VERSIONS] == [32, 64, 64, 64]


def test_a_group_of_heads_stays_in_one_program_or_is_refused():
    """One KV head for 64 query heads (MQA): 64 rows at least, denied or not."""
    wide = ("attention", select, "sm100", 128, 2, 64, 64)
    assert allowed(*wide, triton="3.9.0").block_m == 64
    with pytest.raises(ValueError, match=r"in groups of 64; install a Triton that is not >=3\.6,<3\.7"):
        allowed(*wide, triton="3.6.0")
    assert allowed("attention", select, "sm90", 128, 2, 71, 71, triton="3.6.0").block_m == 128


def test_other_architectures_are_left_alone():
    for architecture, (kernel, size, item, rows) in itertools.product(("sm80", "gfx942"), SHAPES):
        config = SELECTS[kernel](architecture, size, item, rows)
        assert allowed(kernel, SELECTS[kernel], architecture, size, item, rows, triton="3.6.0") == config
        assert denials("3.6.0", architecture) == []


def test_a_denial_is_logged_once_and_counted(caplog):
    allowed.cache_clear()
    before = denylist.APPLIED["wgmma of two warp groups"]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            allowed("attention", select, "sm90", 256, 2, 256, triton="3.7.1")
    assert len(caplog.records) == 1 and "issues/11047" in caplog.text and "32 rows" in caplog.text
    assert denylist.APPLIED["wgmma of two warp groups"] == before + 1


def test_builds_of_a_version_count_as_it():
    assert compat.lies_in("3.7.1+git1234", ">=3.6,<3.9") and not compat.lies_in("3.9.0+cu130", ">=3.6,<3.9")
