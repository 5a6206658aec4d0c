"""M+ in transformers against what the authors' code has computed (``tests/data/mplus``)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mem_triton.systems.memoryllm import long_term as memoryllm_long_term
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton_transformers import apply_mem_triton, inject, long_term, pools, read_pool, remove_mem_triton
from tests.cli.test_cli import run
from tests.memoryllm.test_long_term import UPDATES
from tests.memoryllm.test_mplus_convert import MPLUS
from tests.memoryllm.test_pools_hf import BUDGET, off

WAYS = [(case, rope) for case in UPDATES for rope in ("bf16", "exact")]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints converted, and written as the authors' code was; all versions are kept."""
    folder = tmp_path_factory.mktemp("mplus")
    for case, rope in WAYS:
        run("convert", "mplus", MPLUS / case, folder / f"{case}-{rope}", "--rope", rope)
    for case in UPDATES:
        model, wanted = served(folder / f"{case}-bf16"), expected(case)
        for update, text in enumerate(wanted["texts"]):
            assert inject(model, text[text >= 0], "main", seed=update) == f"main@{update + 2}"
        remove_mem_triton(model)
        shutil.rmtree(folder / f"{case}-exact" / "memory" / "pools")
        shutil.copytree(folder / f"{case}-bf16" / "memory" / "pools", folder / f"{case}-exact" / "memory" / "pools")
    return {f"{case}-{rope}": folder / f"{case}-{rope}" for case, rope in WAYS}


def served(folder: Path, **section: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return apply_mem_triton(model, {"memoryllm": {"pools": str(folder / "memory"), **section}})


def expected(case: str) -> dict[str, torch.Tensor]:
    return load_file(MPLUS / case / "expected.safetensors")


def logits(model: Any, ids: torch.Tensor, pool: str) -> torch.Tensor:
    with torch.no_grad(), read_pool(model, [pool]):
        return model(ids[None]).logits[0]


def chosen(model: Any, ids: torch.Tensor, pool: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The long-term rows [L, K, d] that a prompt reads, in order."""
    seen, stock = [], long_term.gather

    def watched(*arguments: Any) -> Any:
        seen.append(stock(*arguments))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(long_term, "gather", watched)
        logits(model, ids, pool)
    return torch.stack([content for (content,) in seen])


@pytest.mark.parametrize("case", UPDATES)
def test_c3_c9_c11_writes_picks_and_logits_equal_the_authors_code(written, case, monkeypatch):
    """With more and fewer long-term rows than are read, rows that wait for a merge, and after merges."""
    model, wanted = served(written[f"{case}-bf16"]), expected(case)
    points = sorted(int(name.partition(".")[0]) for name in wanted if name[0].isdigit() and name.endswith(".picks"))
    for update in points:
        version = f"main@{update + 1}"
        with Pools.open(written[f"{case}-bf16"] / "memory") as store:
            assert off(store.rows(version), wanted[f"{update}.memory"]) < BUDGET
        picks = chosen(model, wanted["prompt"], version, monkeypatch)
        assert off(picks, wanted[f"{update}.picks"]) < BUDGET, "the same rows in the same order"
        assert off(logits(model, wanted["prompt"], version), wanted[f"{update}.logits"]) < BUDGET
    with Pools.open(written[f"{case}-bf16"] / "memory") as store:
        state = store.state("main").long_term
    for layer in range(3):
        rows = torch.cat([part.content[0] for part in state.merged[layer]])
        assert off(rows, wanted[f"ltm.{layer}"]) < BUDGET and torch.equal(
            state.ages[layer], wanted[f"memory_ages.{layer}"]
        )
    with read_pool(model, ["main"]):
        answer = model.generate(wanted["prompt"][None], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(answer[0, len(wanted["prompt"]) :], wanted["tokens"]), "what the prompt chose stays"


@pytest.mark.parametrize("case", UPDATES)
def test_rounded_and_exact_frequencies_differ_and_each_equals_its_reference(written, case):
    wanted, last = expected(case), UPDATES[case]
    exact = logits(served(written[f"{case}-exact"]), wanted["prompt"], "main")
    assert off(exact, wanted["exact.logits"]) < BUDGET
    assert off(exact, wanted[f"{last}.logits"]) > 30 * BUDGET


def test_c7_a_batch_of_8_padded_rows_is_8_single_runs(written, monkeypatch):
    model, wanted = served(written["grown-bf16"]), expected("grown")
    chance = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 96, (n,), generator=chance) for n in (12, 3, 7, 12, 1, 9, 5, 11)]
    names = ["main", "main@1", None, "main@9", "main@4", "main", "main@71", "main@1"]
    ids = torch.stack([torch.cat([torch.zeros(12 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(12) >= 12 - len(p) for p in prompts]).long()
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), read_pool(model, names):
        both = model.generate(ids, attention_mask=mask, **options)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        with read_pool(model, [name]):
            single = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        assert torch.equal(both[row, 12:], single[0, len(prompt) :]), row
        if name is not None:
            assert off(got[row, -len(prompt) :], logits(model, prompt, name)) < BUDGET
    assert off(logits(model, wanted["prompt"], "main@1"), logits(model, wanted["prompt"], "main@71")) > 100 * BUDGET


def test_controls_of_reading(written, monkeypatch):
    """What is easily got wrong differs from the authors' logits by far more than the budget."""
    wanted = expected("grown")
    model = served(written["grown-bf16"])
    stock = memoryllm_long_term.pick

    def unordered(*arguments: Any) -> torch.Tensor:
        return stock(*arguments).sort()[0]

    def worst(scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        return stock(-scores, *rest)

    for fault in (unordered, worst):
        with monkeypatch.context() as patch:
            patch.setattr(memoryllm_long_term, "pick", fault)
            assert off(logits(model, wanted["prompt"], "main"), wanted["70.logits"]) > 100 * BUDGET, fault.__name__
    with monkeypatch.context() as patch:  # padding among the tokens that ask
        patch.setattr(long_term.Choosing, "choose", lambda *_, **__: None)
        assert off(logits(model, wanted["prompt"], "main"), wanted["70.logits"]) > 100 * BUDGET
    assert off(logits(model, wanted["prompt"], "main"), wanted["70.logits"]) < BUDGET


def test_taking_pools_off_gives_the_model_its_own_frequencies_back(written):
    folder = written["grown-bf16"]
    stock = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 42, 8, 9, 33, 21]])
    before = stock(ids).logits
    model = apply_mem_triton(stock, {"memoryllm": {"pools": str(folder / "memory")}})
    assert not torch.equal(model(ids).logits, before), "others are in use"
    remove_mem_triton(model)
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model = served(folder)
        with read_pool(model, ["main"]):
            with pytest.raises(ValueError, match="a batch of 2 rows"):
                model(ids.expand(2, -1))
            with pytest.raises(ValueError, match="give the mask"):
                model(ids, attention_mask=torch.zeros(1, 1, 7, 7))
    assert pools._pools_of(model).retriever is not None
