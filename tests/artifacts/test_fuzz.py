"""Spoilt adapters, cartridges and checkpoints are one line, never a traceback, and leave nothing behind."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from peft import CartridgeConfig

from tests.cli.fuzz_case import spoil, spoil_bytes, spoil_json
from tests.cli.test_fuzz import check
from tests.memoryllm.test_pools import GOLDEN
from tests.support.trained import chance_cache, load_model, save_adapter, save_cartridge, save_model

SOON, MANY = 25, 1000


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    model = save_model(folder / "model")
    save_adapter(folder / "adapter", model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    save_cartridge(folder / "run" / "cartridge.pt", *chance_cache(load_model(model), 4))
    (folder / "run" / "config.yaml").write_text("model:\n  pretrained_model_name_or_path: model\n")
    shutil.copytree(GOLDEN / "adapters", folder / "checkpoint")
    (folder / "checkpoint" / "expected.safetensors").unlink()
    return folder


def spoilt(place: Path, work: Path, seed: int) -> int:
    """One command on a folder of which one file is spoilt."""
    chance = random.Random(seed)
    kind = chance.choice(["adapter", "run", "checkpoint", "model"])
    for name in ("adapter", "run", "checkpoint", "model"):
        shutil.copytree(place / name, work / name)
    files = [p for p in sorted((work / kind).iterdir()) if p.suffix in (".json", ".safetensors", ".pt", ".yaml")]
    file = chance.choice([path for path in files if "token" not in path.name and "generation" not in path.name])
    if file.suffix in (".pt", ".yaml"):
        file.write_bytes(spoil_bytes(file.read_bytes(), chance))
    elif file.suffix == ".json" and chance.random() < 0.8:
        file.write_text(json.dumps(spoil_json(json.loads(file.read_text()), chance)))
    else:
        spoil(file, chance)
    if kind == "checkpoint":
        code, made = check(["convert", "memoryllm", str(work / kind), str(work / "out")]), work / "out"
    else:
        source = work / (kind if kind != "model" else "adapter")
        code, made = check(["import", str(source), str(work / "out"), "--model", str(work / "model")]), work / "out"
    assert made.exists() == (code == 0)
    return code


def test_spoilt_files_are_one_line(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    codes = {spoilt(place, tmp_path / str(seed), seed) for seed in range(SOON)}
    assert 2 in codes


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_soak_of_spoilt_files(place, tmp_path, monkeypatch, part):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for seed in range(10_000 + part * MANY, 10_000 + (part + 1) * MANY):
        spoilt(place, tmp_path / "work", seed)
        shutil.rmtree(tmp_path / "work")
