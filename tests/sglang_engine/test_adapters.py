"""Which LoRA adapters SGLang has loaded (fault 14), with a stand-in for its part."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from mem_triton.runtime.incidents import VARIABLE
from mem_triton.systems.lora import LoadedAdapters, files_of
from tests.runtime.test_lora import adapter, overwrite

__all__ = ["adapter"]


@pytest.fixture
def manager(monkeypatch, adapter, tmp_path_factory):
    """SGLang's front end, started with one adapter."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from mem_triton_sglang.adapters import KnownAdapters

    async def load(self, obj, request=None):
        return SimpleNamespace(success=True)

    monkeypatch.setattr(TokenizerManager, "load_lora_adapter", load)
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.mktemp("launched") / "incidents.jsonl"))
    manager = object.__new__(KnownAdapters)
    manager.server_args = SimpleNamespace(max_loaded_loras=1)
    manager.lora_ref_cache = {"poet": SimpleNamespace(lora_name="poet", lora_path=str(adapter))}
    manager.know_adapters()
    return manager


def digest(adapter) -> str:
    adapters = LoadedAdapters()
    adapters.loaded("poet", str(adapter), files_of(str(adapter)))
    return adapters.answering("poet", "poet", str(adapter)).identity


def test_fault14_an_adapter_of_the_start_is_what_its_files_were(manager, adapter):
    first = manager.answering("poet")
    assert first.identity == digest(adapter) and first.holds() and manager.answering(None) is None
    overwrite(adapter)
    assert manager.answering("poet").identity == first.identity, "SGLang has it in its memory"


def test_fault14_files_that_change_while_schedulers_start_are_no_adapter_s(manager, adapter):
    """They may have been read before, or behind that."""
    known = {digest(adapter)}
    overwrite(adapter)
    known.add(digest(adapter))
    assert manager.answering("poet").identity not in known


def test_fault14_files_that_changed_before_the_front_end_looked_are_no_adapter_s(manager, adapter):
    """A scheduler may have read them by then."""
    overwrite(adapter)
    manager.know_adapters()
    assert manager.answering("poet").identity != digest(adapter)


def test_fault14_an_adapter_that_sglang_dropped_and_read_anew_behind_an_admission_has_not_stayed(manager, adapter):
    """Its load is told then; the request was admitted for the files of before."""
    load = SimpleNamespace(lora_name="poet", lora_path=str(adapter))
    admitted = manager.answering("poet")
    asyncio.run(manager.load_lora_adapter(load))
    assert admitted.holds(), "the same weights"
    overwrite(adapter)
    asyncio.run(manager.load_lora_adapter(load))
    assert not admitted.holds() and manager.answering("poet").holds()


def test_fault14_a_load_whose_client_left_may_have_happened(manager, adapter, monkeypatch):
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    async def left(self, obj, request=None):
        raise asyncio.CancelledError

    first = manager.answering("poet")
    monkeypatch.setattr(TokenizerManager, "load_lora_adapter", left)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(manager.load_lora_adapter(SimpleNamespace(lora_name="poet", lora_path=str(adapter))))
    assert manager.answering("poet").identity != first.identity and not first.holds()


def test_fault14_a_name_that_was_never_loaded_is_like_no_other(manager):
    """SGLang refuses the request by name."""
    assert manager.answering("nobody").identity != manager.answering("nobody").identity
