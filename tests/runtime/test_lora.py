"""Whose LoRA adapter it is: by its weights, not by where they lie (fault 14)."""

from __future__ import annotations

import os

import pytest

from mem_triton.systems.lora import lora_identity


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 64)
    return folder


def test_fault14_other_weights_under_the_same_name_and_path_are_another_adapter(adapter):
    first = lora_identity("poet", str(adapter))
    assert first == lora_identity("poet", str(adapter)) and first.startswith("poet:") and str(adapter) not in first
    file = adapter / "adapter_model.safetensors"
    stat = file.stat()
    file.write_bytes(bytes(range(255, -1, -1)) * 64)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # as large as before
    assert lora_identity("poet", str(adapter)) != first


def test_fault14_the_same_weights_elsewhere_are_the_same_adapter(adapter, tmp_path):
    first = lora_identity("poet", str(adapter))
    moved = adapter.rename(tmp_path / "moved")
    os.utime(moved / "adapter_model.safetensors")
    assert lora_identity("poet", str(moved)) == first
    assert lora_identity("other", str(moved)) != first


def test_what_is_no_folder_is_known_by_its_path():
    assert lora_identity("poet", "someone/poet") != lora_identity("poet", "someone/else")
    assert lora_identity("", None) == ""
