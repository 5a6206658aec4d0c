"""Whose LoRA adapter it is: by the weights that the engine loaded, not by where they lie (fault 14)."""

from __future__ import annotations

import os

import pytest

from mem_triton.systems import lora
from mem_triton.systems.lora import LoadedAdapters, files_of

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


def named(adapters: LoadedAdapters, adapter, name: str = "poet") -> str:
    """What its sessions know it by."""
    return adapters.answering(1, name, str(adapter)).identity


def load(adapters: LoadedAdapters, adapter) -> str:
    adapters.loaded(1, str(adapter), files_of(str(adapter)))
    return named(adapters, adapter)


def test_fault14_other_weights_under_the_same_name_and_path_are_another_adapter(adapter):
    adapters = LoadedAdapters()
    first = load(adapters, adapter)
    assert first == load(LoadedAdapters(), adapter) and first.startswith("poet:") and str(adapter) not in first
    overwrite(adapter)
    assert load(adapters, adapter) != first


def test_fault14_files_that_are_not_loaded_yet_are_not_the_adapter(adapter):
    adapters = LoadedAdapters()
    first = load(adapters, adapter)
    overwrite(adapter)
    assert named(adapters, adapter) == first != load(LoadedAdapters(), adapter)
    assert adapters.knows(1) and not adapters.has_read(1, str(adapter))
    adapters.forget(1)
    assert not adapters.knows(1) and load(adapters, adapter) != first and adapters.has_read(1, str(adapter))


def test_fault14_an_adapter_whose_load_was_not_told_is_like_no_other(adapter):
    """It is read some time after the request was admitted: nobody knows what its files hold then."""
    adapters = LoadedAdapters()
    untold = [adapters.answering(1, "poet", str(adapter)) for _ in range(2)]
    assert len({load(LoadedAdapters(), adapter), *(one.identity for one in untold)}) == 3
    assert not untold[0].holds()


def test_fault14_one_changed_byte_is_another_adapter(tmp_path):
    """Wherever it lies: the whole of the files is looked at."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    data, names = bytearray(1 << 20), set()
    for changed in range(0, len(data), 100_003):
        data[changed] ^= 1
        (folder / WEIGHTS).write_bytes(data)
        names.add(load(LoadedAdapters(), folder))
    assert len(names) == 11


def test_fault14_an_adapter_that_was_loaded_anew_while_it_answered_has_not_stayed(adapter):
    """Its request was answered by two; so it was if the old weights came back in time."""
    adapters = LoadedAdapters()
    load(adapters, adapter)
    first = adapters.answering(1, "poet", str(adapter))
    load(adapters, adapter)
    assert first.holds() and adapters.answering(1, "poet", str(adapter)).load == first.load, "the same weights"
    overwrite(adapter)
    assert first.holds(), "they are not read"
    load(adapters, adapter)
    assert not first.holds()
    overwrite(adapter)
    load(adapters, adapter)
    again = adapters.answering(1, "poet", str(adapter))
    assert again.identity == first.identity and again.load != first.load and again.holds() and not first.holds()


def test_fault14_files_that_change_while_they_are_read_are_no_adapter_s(adapter):
    adapters, known = LoadedAdapters(), {load(LoadedAdapters(), adapter)}
    before = files_of(str(adapter))
    overwrite(adapter)
    adapters.loaded(1, str(adapter), before)
    known.add(load(LoadedAdapters(), adapter))
    mixed = named(adapters, adapter)
    assert mixed not in known and mixed == named(adapters, adapter)


def test_fault14_an_adapter_that_may_have_been_loaded_again_unseen_is_like_no_other(adapter, tmp_path):
    adapters = LoadedAdapters(capacity=1)
    first = load(adapters, adapter)
    adapters.loaded(2, str(tmp_path), files_of(str(tmp_path)))  # the engine has dropped one of them
    assert named(adapters, adapter) == first, "whichever files it has read, they are these"
    overwrite(adapter)
    unknown = [named(adapters, adapter) for _ in range(2)]
    assert len({first, load(LoadedAdapters(), adapter), *unknown}) == 4


def test_fault14_weights_that_came_from_no_files_are_their_load_s_own():
    adapters, names = LoadedAdapters(capacity=1), []
    for _ in range(2):
        adapters.loaded("poet", None, None)
        names += [adapters.answering("poet", "poet", None).identity] * 2
    adapters.loaded("other", None, None)
    assert len(set(names)) == 2 and adapters.answering("poet", "poet", None).identity == names[-1]


def test_fault14_the_same_weights_elsewhere_are_the_same_adapter(adapter, tmp_path):
    first = load(LoadedAdapters(), adapter)
    moved = adapter.rename(tmp_path / "moved")
    os.utime(moved / WEIGHTS)
    assert load(LoadedAdapters(), moved) == first
    adapters = LoadedAdapters()
    load(adapters, moved)
    assert named(adapters, moved, "other") != first


def test_fault14_an_adapter_of_the_hub_is_known_by_what_was_downloaded(tmp_path, monkeypatch):
    """The same name means other weights another day."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, names = tmp_path / "models--someone--poet", []
    (repo / "refs").mkdir(parents=True)
    for revision in ("a" * 40, "b" * 40, "a" * 40):
        before = files_of("someone/poet")
        (repo / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
        (repo / "snapshots" / revision / WEIGHTS).write_text(revision)
        (repo / "refs" / "main").write_text(revision)
        adapters = LoadedAdapters()
        adapters.loaded(1, "someone/poet", () if not names else files_of("someone/poet"))
        names.append(named(adapters, "someone/poet"))
    assert before and names[0] == names[2] != names[1]


def test_fault14_what_lies_nowhere_is_like_no_other():
    adapters = LoadedAdapters()
    adapters.loaded(1, "/not/here", files_of("/not/here"))
    first = named(adapters, "/not/here")
    adapters.loaded(1, "/not/here", files_of("/not/here"))
    assert named(adapters, "/not/here") != first


def test_fault14_an_adapter_whose_files_vanish_while_they_are_looked_at_is_like_no_other(adapter, monkeypatch):
    adapters = LoadedAdapters()
    known = {load(adapters, adapter)}
    monkeypatch.setattr(lora, "_read_of", lambda folder: [folder / "was here"])
    known |= {load(adapters, adapter) for _ in range(2)}
    assert len(known) == 3
