"""Whose LoRA adapter it is: by the weights that the engine loaded, not by where they lie (fault 14)."""

from __future__ import annotations

import os

import pytest

from mem_triton.systems.lora import LoadedAdapters, files_digest

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 64)
    return folder


def overwrite(adapter) -> None:
    """Other weights in as many bytes."""
    file = adapter / WEIGHTS
    stat = file.stat()
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def load(adapters: LoadedAdapters, adapter) -> str:
    adapters.loaded(1, str(adapter), files_digest(str(adapter)))
    return adapters.identity(1, "poet", str(adapter))


def test_fault14_other_weights_under_the_same_name_and_path_are_another_adapter(adapter):
    adapters = LoadedAdapters()
    first = load(adapters, adapter)
    assert first == load(LoadedAdapters(), adapter) and first.startswith("poet:") and str(adapter) not in first
    overwrite(adapter)
    assert load(adapters, adapter) != first


@pytest.mark.parametrize("told", [True, False], ids=["the engine told", "its first request loads it"])
def test_fault14_files_that_are_not_loaded_yet_are_not_the_adapter(adapter, told):
    adapters = LoadedAdapters()
    first = load(adapters, adapter) if told else adapters.identity(1, "poet", str(adapter))
    overwrite(adapter)
    assert adapters.identity(1, "poet", str(adapter)) == first != load(LoadedAdapters(), adapter)
    adapters.forget(1)
    assert not adapters.knows(1) and load(adapters, adapter) != first


def test_fault14_files_that_change_while_they_are_read_are_no_adapter_s(adapter):
    adapters, known = LoadedAdapters(), {load(LoadedAdapters(), adapter)}
    before = files_digest(str(adapter))
    overwrite(adapter)
    adapters.loaded(1, str(adapter), before)
    known.add(load(LoadedAdapters(), adapter))
    mixed = adapters.identity(1, "poet", str(adapter))
    assert mixed not in known and mixed == adapters.identity(1, "poet", str(adapter))


def test_fault14_an_adapter_that_may_have_been_loaded_again_unseen_is_like_no_other(adapter, tmp_path):
    adapters = LoadedAdapters(capacity=1)
    first = load(adapters, adapter)
    adapters.loaded(2, str(tmp_path), files_digest(str(tmp_path)))  # the engine has dropped one of them
    assert adapters.identity(1, "poet", str(adapter)) == first, "whichever files it has read, they are these"
    overwrite(adapter)
    unknown = [adapters.identity(1, "poet", str(adapter)) for _ in range(2)]
    assert len({first, load(LoadedAdapters(), adapter), *unknown}) == 4


def test_fault14_weights_that_came_from_no_files_are_their_load_s_own():
    adapters, names = LoadedAdapters(capacity=1), []
    for _ in range(2):
        adapters.loaded("poet", None, None)
        names += [adapters.identity("poet", "poet", None)] * 2
    adapters.loaded("other", None, None)
    assert len(set(names)) == 2 and adapters.identity("poet", "poet", None) == names[-1]


def test_fault14_the_same_weights_elsewhere_are_the_same_adapter(adapter, tmp_path):
    first = load(LoadedAdapters(), adapter)
    moved = adapter.rename(tmp_path / "moved")
    os.utime(moved / WEIGHTS)
    assert load(LoadedAdapters(), moved) == first
    assert LoadedAdapters().identity(1, "other", str(moved)) != first


def test_what_is_no_folder_is_known_by_its_path():
    assert files_digest("someone/poet") != files_digest("someone/else")
