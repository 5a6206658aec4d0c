"""Trained keys and values read from a bank give what transformers and peft give with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mem_triton.store.bank import Bank
from mem_triton.store.pool.plan import Attachment
from mem_triton_transformers import read_plans
from tests.cli.test_cli import run
from tests.support.trained import (
    ROPES,
    cache_logits,
    chance_cache,
    load_model,
    peft_logits,
    save_adapter,
    save_cartridge,
    save_model,
)

BUDGET = 2e-5
"""Largest difference of a logit, in fp32."""
IDS = torch.randint(0, 512, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A model's folder by RoPE."""
    folder = tmp_path_factory.mktemp("bases")
    return {rope: save_model(folder / rope, rope) for rope in ROPES}


def imported(bank: Path, base: Path, *arguments: object) -> list[str]:
    report = json.loads(run("import", *arguments, bank, "--model", base, "--json"))
    return report["added"]


def read(base: Path, bank: Path, *refs: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The model's logits while it reads these entries."""
    model = load_model(base, dtype)
    with Bank.open(bank) as opened, read_plans(model, opened, [[Attachment(ref) for ref in refs]] * 2), torch.no_grad():
        return model(IDS).logits


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max().detach())


def peft_config(kind: str, **options: Any) -> Any:
    import peft

    kinds = {
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "CARTRIDGE": peft.CartridgeConfig,
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig,
    }
    return kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=9, **options)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("fixed", "word"), [(1, "fixed"), (3, "frozen"), (0, "fixed")])
def test_a_cartridge_equals_its_kv_cache(bases, tmp_path, rope, fixed, word):
    model = load_model(bases[rope])
    keys, values = chance_cache(model, 20)
    file = save_cartridge(tmp_path / "c.pt", keys, values, fixed, word)
    (ref,) = imported(tmp_path / "bank", bases[rope], file)
    wanted = cache_logits(model, IDS, keys, values)
    got = read(bases[rope], tmp_path / "bank", ref)
    assert off(got, wanted) <= BUDGET
    assert off(got, model(IDS).logits) > 0.5, "it matters"


PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 32}


@pytest.mark.parametrize(
    ("kind", "options", "rope"),
    [
        *(("CARTRIDGE", {"num_frozen_tokens": 2}, rope) for rope in ROPES),
        *(("PROMPT_TUNING", {}, rope) for rope in ROPES),
        ("PREFIX_TUNING", {}, "llama3"),
        ("PREFIX_TUNING", PROJECTED, "yarn"),
        ("P_TUNING", {"encoder_hidden_size": 32}, "yarn"),
    ],
)
def test_an_adapter_of_peft_equals_peft(bases, tmp_path, rope, kind, options):
    base = bases[rope]
    adapter = save_adapter(tmp_path / "adapter", base, peft_config(kind, **options))
    (ref,) = imported(tmp_path / "bank", base, adapter)
    got = read(base, tmp_path / "bank", ref)
    assert off(got, peft_logits(base, adapter, IDS)) <= BUDGET
    with torch.no_grad():
        assert off(got, load_model(base)(IDS).logits) > 0.1, "it matters"


def test_without_turning_keys_back_another_model_answers(bases, tmp_path, monkeypatch):
    """The control of the budget: keys that are stored as they lie in the file."""
    from mem_triton.store.bank.formats import trained

    monkeypatch.setattr(trained, "unrotate", lambda x, positions, rope: x)
    model = load_model(bases["default"])
    keys, values = chance_cache(model, 20)
    (ref,) = imported(tmp_path / "bank", bases["default"], save_cartridge(tmp_path / "c.pt", keys, values))
    assert off(read(bases["default"], tmp_path / "bank", ref), cache_logits(model, IDS, keys, values)) > 100 * BUDGET


def test_bf16_serving_costs_no_more_than_twice_what_bf16_costs_transformers(bases, tmp_path):
    base = bases["llama3"]
    exact, rounded = load_model(base), load_model(base, torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for seed in range(4):
        keys, values = chance_cache(exact, 20, seed)
        file = save_cartridge(tmp_path / f"c{seed}.pt", keys, values)
        (ref,) = imported(tmp_path / "bank", base, file)
        wanted = cache_logits(exact, IDS, keys, values)
        theirs += float((cache_logits(rounded, IDS, keys, values).float() - wanted).square().mean())
        ours += float((read(base, tmp_path / "bank", ref, dtype=torch.bfloat16).float() - wanted).square().mean())
    assert 0 < ours**0.5 <= 2 * theirs**0.5


def composed_by_peft(folder: Path, adapters: list[Path]) -> Path:
    from peft.tuners.cartridge.utils import compose_cartridge_adapters

    compose_cartridge_adapters([str(path) for path in adapters], output_path=str(folder))
    return folder


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_composing_equals_peft_and_side_by_side_is_something_else(bases, tmp_path, rope):
    base, bank = bases[rope], tmp_path / "bank"
    one, two = (save_adapter(tmp_path / f"a{i}", base, peft_config("CARTRIDGE"), seed=i) for i in range(2))
    (ref,) = imported(bank, base, "--compose", "--id", "both", one, two)
    wanted = peft_logits(base, composed_by_peft(tmp_path / "composed", [one, two]), IDS)
    assert off(read(base, bank, ref), wanted) <= BUDGET
    refs = imported(bank, base, one, two)
    assert refs == ["a0@1", "a1@1"]
    assert off(read(base, bank, *refs), wanted) > 100 * BUDGET


@pytest.mark.parametrize("rope", ROPES)
def test_what_is_exported_is_read_by_peft_with_equal_logits(bases, tmp_path, rope):
    """A text's own KV, the start of a training run; and what was imported comes back number by number."""
    base, bank = bases[rope], tmp_path / "bank"
    (tmp_path / "notes.txt").write_text("The key of the east door is with Hugo.")
    run("write", base, bank, tmp_path / "notes.txt", "--kind", "prefix", "--quiet")
    out = tmp_path / "notes-adapter"
    run("bank", "export", bank, "notes", "--as", "peft", out, "--model", base)
    assert off(peft_logits(base, out, IDS), read(base, bank, "notes@1")) <= BUDGET
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["peft_type"] == "CARTRIDGE" and said["base_model_name_or_path"] == str(base)
    assert said["num_frozen_tokens"] == 1

    model = load_model(base)
    keys, values = chance_cache(model, 12)
    imported(bank, base, save_cartridge(tmp_path / "c.pt", keys, values, 3))
    run("bank", "export", bank, "c", "--as", "peft", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["num_frozen_tokens"] == 3
    assert off(peft_logits(base, tmp_path / "again", IDS), cache_logits(model, IDS, keys, values)) <= BUDGET


def test_the_same_numbers_are_written_once_and_others_are_the_next_version(bases, tmp_path):
    base, bank = bases["default"], tmp_path / "bank"
    model = load_model(base)
    save_cartridge(tmp_path / "c.pt", *chance_cache(model, 5))
    assert imported(bank, base, tmp_path / "c.pt") == ["c@1"]
    assert "there already" in run("import", tmp_path / "c.pt", bank, "--model", base)
    save_cartridge(tmp_path / "c.pt", *chance_cache(model, 5, seed=1))
    assert imported(bank, base, tmp_path / "c.pt") == ["c@2"]
    with Bank.open(bank) as opened:
        assert (opened.spec.codec, opened.spec.dtype) == ("fp32", "float32")
        about = opened.resolve("c").metadata["trained"]
    assert (about["form"], about["rows"], about["frozen"]) == ("cartridge", 5, 1)


def test_texts_are_written_into_a_bank_of_imports_whatever_the_models_precision(tmp_path):
    base, bank = save_model(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "bank"
    imported(bank, base, save_cartridge(tmp_path / "c.pt", *chance_cache(load_model(base), 5)))
    (tmp_path / "notes.txt").write_text("The key of the east door is with Hugo.")
    run("write", base, bank, tmp_path / "notes.txt", "--kind", "prefix", "--quiet")
    with Bank.open(bank) as opened:
        assert opened.load("notes").keys.dtype == torch.float32 and opened.load("c").keys.dtype == torch.float32
