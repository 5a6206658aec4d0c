"""Commands beside the bank's, with spoilt arguments and files: import, convert, pool, memo, serve, train and doctor."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from mem_triton.runtime.serving import Serving
from mem_triton.systems.memoryllm.pools import Pools
from tests.cli.fuzz_case import check, copied, outcome, soak, spoil, spoil_arguments
from tests.memo.test_memo_merging import adapter
from tests.memoryllm.test_pools import GOLDEN
from tests.support.soak import SECONDS
from tests.support.trained import chance_cache, load_model, save_adapter, save_cartridge, save_model

NOBODY = "http://127.0.0.1:9/v1#m"
SOON = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, artifacts of every kind, and a store of pools, all of them good."""
    from peft import CartridgeConfig

    folder = tmp_path_factory.mktemp("fuzz")
    base = save_model(folder / "model")
    model = load_model(base)
    save_cartridge(folder / "cartridge" / "cartridge.pt", *chance_cache(model, 5))
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
    save_adapter(folder / "peft", base, config)
    adapter(folder / "one", 1)
    adapter(folder / "two", 2)
    for name in ("plain", "mplus"):
        source = GOLDEN / "plain" if name == "plain" else GOLDEN.parent / "mplus" / "few"
        copied(source, folder / name)
        (folder / name / "expected.safetensors").unlink()
    check(["convert", "memoryllm", str(folder / "plain"), str(folder / "converted")])
    with Pools.open(folder / "converted" / "memory", writable=True) as pools:
        pools.add("mine", torch.zeros(3, 32, 32))
        pools.add("theirs", torch.zeros(3, 32, 32), "acme")
    (folder / "text.md").write_text("Norlux was founded by Mara Stone.\n\nIt makes lamps.\n")
    rows = [{"id": "a", "question": "Who?", "answer": "Mara.", "source": "text"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "section.yaml").write_text("memory: {bank: bank, pool_gib: 1}\ndelta: {adapter: a}\n")
    return folder


def commands(at: Path) -> dict[str, list[list[str]]]:
    """Each command as it works, by the file or folder that may be spoilt before it. Training ends at its rows or model:
    no spoilt word makes it run for hours."""
    new, model, memory = str(at / "new"), str(at / "model"), str(at / "converted" / "memory")
    bank = [str(at / "bank"), "--model", model]
    return {
        "cartridge": [
            ["import", str(at / "cartridge"), *bank, "--id", "x", "--as", "cartridge"],
            ["import", str(at / "cartridge"), *bank, "--file", "cartridge.pt", "--json"],
        ],
        "peft": [["import", str(at / "peft"), str(at / "cartridge"), *bank, "--compose", "--id", "y"]],
        "plain": [["convert", "memoryllm", str(at / "plain"), new, "--dtype", "float32"]],
        "mplus": [["convert", "mplus", str(at / "mplus"), new, "--rope", "exact", "--dtype", "bfloat16"]],
        "converted": [
            ["pool", "list", memory],
            ["pool", "info", memory, "--json"],
            ["pool", "export", memory, "mine@1", str(at / "out.safetensors")],
            ["pool", "fork", memory, "mine", "twin"],
            ["pool", "snapshot", memory, "theirs", "--tenant", "acme"],
            ["pool", "verify", memory, "--json"],
            ["pool", "compact", memory, "mine"],
            ["pool", "delete", memory, "mine"],
            ["doctor", "--json", "--pools", memory],
            ["convert", "memoryllm", str(at / "converted"), new, "--back", "--pool", "mine@1"],
        ],
        "one": [
            ["memo", "merge", str(at / "one"), str(at / "two"), "--out", new, "--method", "linear", "--weights", "1,1"],
            ["memo", "merge", str(at / "one"), str(at / "two"), "--out", new, "--method", "dare_ties", "--seed", "3"],
            ["memo", "merge", str(at / "one"), str(at / "two"), "--out", new, "--method", "slerp", "--t", "0.2"],
            ["serve", model, "--memo", str(at / "one"), "--memo-executive", NOBODY, "--engine", "vllm", "--print"],
        ],
        "section.yaml": [["serve", model, "--config", str(at / "section.yaml"), "--engine", "vllm", "--print"]],
        "text.md": [["memo", "build", str(at / "text.md"), new, "--requests", "1", "--at-once", "2", "--quiet"]],
        "rows.jsonl": [
            ["train", "memo", str(at / "rows.jsonl"), new, "--model", str(at / "one"), "--rate", "1e-3"],
            ["train", "cartridge", str(at / "one"), str(at / "text.md"), new, "--rows", "2", "--steps", "2"],
            ["train", "delta", str(at / "one"), str(at / "rows.jsonl"), new, "--steps", "2", "--rank", "2"],
            ["memo", "ask", "Who?", "--executive", NOBODY, "--memory", NOBODY, "--seconds", "1", "--quiet", "--json"],
        ],
    }


def run_one(place: Path, work: Path, seed: int) -> int:
    chance = random.Random(seed)
    at = copied(place, work)
    spoilt, choices = chance.choice(list(commands(at).items()))
    command = chance.choice(choices)
    if chance.random() < 0.5:
        files = [at / spoilt] if (at / spoilt).is_file() else [f for f in (at / spoilt).rglob("*") if f.is_file()]
        spoil(chance.choice(sorted(files)), chance)
        command = spoil_arguments(command, chance) if chance.random() < 0.3 else command
    else:
        command = spoil_arguments(command, chance)
    with torch.random.fork_rng():
        return check(command)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")  # some words are relative paths
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read by the first import
    monkeypatch.setattr(Serving, "run", lambda self: None)  # it would take this process' place
    return tmp_path / "work"


def test_every_command_works_as_it_stands(place, work):
    """Or ends at a model that is none, or at a server that nobody runs."""
    for choices in commands(copied(place, work)).values():
        for command in choices:
            copied(place, work)
            code, _, err = outcome(command)
            assert code in ((1, 2) if command[0] == "train" or command[1] in ("ask", "build") else (0,)), (command, err)


def test_fault22_spoilt_arguments_and_files_are_one_line(place, work):
    assert {0, 2} <= {run_one(place, work, seed) for seed in range(SOON)}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_fault22_soak_of_every_other_command(place, work):
    soak(lambda seed: run_one(place, work, seed))
