"""MemoryLLM's pools in transformers against what the authors' code has computed (``tests/data/memoryllm``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.config import ConfigError
from mem_triton.systems.memoryllm import write
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton_transformers import apply_mem_triton, inject, pools, read_memory, read_pool, remove_mem_triton
from tests.cli.test_cli import run
from tests.memoryllm.test_pools import GOLDEN

TEXTS = ("long", "short", "exact", "again")
BUDGET = 1e-5
"""Largest difference, as a part of the largest number."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for case in ("plain", "adapters"):
        run("convert", "memoryllm", GOLDEN / case, folder / case)
    return {case: folder / case for case in ("plain", "adapters")}


def fresh(converted: dict[str, Path], case: str, tmp_path: Path, attention: str = "sdpa", **section: Any) -> Any:
    """The converted model with a copy of its pools."""
    import shutil

    from transformers import AutoModelForCausalLM

    folder = converted[case] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    memory = tmp_path / "memory"
    if not memory.exists():
        shutil.copytree(converted[case] / "memory", memory)
    return apply_mem_triton(model, {"memoryllm": {"pools": str(memory), **section}})


def expected(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "expected.safetensors")


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def logits(model: Any, ids: torch.Tensor, pool: str | None) -> torch.Tensor:
    with torch.no_grad():
        if pool is None:
            return model(ids[None]).logits[0]
        with read_pool(model, [pool]):
            return model(ids[None]).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["plain", "adapters"])
def test_c1_c3_c4_c8_c10_writes_and_reads_equal_the_authors_code(converted, tmp_path, case, attention):
    """A first write into a pool without rows, longer and shorter texts, and one of as many tokens as rows are made."""
    model, wanted = fresh(converted, case, tmp_path, attention), expected(case)
    for seed, text in enumerate(TEXTS):
        reference = inject(model, wanted[f"{text}.ids"], "main", seed=seed)
        with Pools.open(tmp_path / "memory") as store:
            assert off(store.rows(reference), wanted[f"{text}.memory"]) < BUDGET, text
        assert off(logits(model, wanted["prompt"], "main"), wanted[f"{text}.logits"]) < BUDGET, text
    assert off(logits(model, wanted["prompt"], None), wanted["again.logits"]) > 1000 * BUDGET, "it matters"
    with read_pool(model, ["main"]):
        answer = model.generate(wanted["prompt"][None], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(answer[0, len(wanted["prompt"]) :], wanted["tokens"]), "positions go on behind the text"


def test_c6_c7_each_row_of_a_ragged_batch_reads_its_own(converted, tmp_path):
    model, wanted = fresh(converted, "adapters", tmp_path), expected("adapters")
    inject(model, wanted["long.ids"], "main", seed=0)
    prompts = [wanted["prompt"], wanted["prompt"][:4], wanted["prompt"][2:9], wanted["prompt"][:6]]
    names = ["main", "main@1", None, "main@2"]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), read_pool(model, names) as versions:
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert versions == ["main@2", "main@1", None, "main@2"]
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        assert off(got[row, -len(prompt) :], logits(model, prompt, name)) < BUDGET
    assert off(logits(model, prompts[0], "main@1"), logits(model, prompts[0], "main@2")) > 1000 * BUDGET


def test_a_version_that_is_read_stays_the_same_while_the_pool_is_written(converted, tmp_path):
    model, wanted = fresh(converted, "adapters", tmp_path), expected("adapters")
    with read_pool(model, ["main"]) as versions, torch.no_grad():
        before = model(wanted["prompt"][None]).logits
        with Pools.open(tmp_path / "memory", writable=True) as store, store.writing("main") as writing:
            writing.apply(wanted["long.delta"])
            assert writing.commit() == "main@2"
        assert versions == ["main@1"] and torch.equal(model(wanted["prompt"][None]).logits, before)
    assert off(logits(model, wanted["prompt"], "main"), before[0]) > 1000 * BUDGET


def test_long_texts_go_in_chunks_and_are_one_version(converted, tmp_path):
    model, wanted = fresh(converted, "adapters", tmp_path, chunk=8), expected("adapters")
    assert inject(model, wanted["long.ids"], seed=3) == "main@2"
    twin = tmp_path / "twin"
    twin.mkdir()
    other = fresh(converted, "adapters", twin)
    for start in range(0, 21, 8):
        inject(other, wanted["long.ids"][start : start + 8], seed=start)
    with Pools.open(tmp_path / "memory") as one, Pools.open(twin / "memory") as two:
        assert off(one.rows("main")[:, -8:], two.rows("main")[:, -8:]) < BUDGET, "each chunk reads the one before"


@pytest.mark.parametrize("case", ["plain", "adapters"])
def test_controls_of_the_write(converted, tmp_path, monkeypatch, case):
    """What is easily got wrong differs from the authors' rows by far more than the budget."""
    wanted = expected(case)
    stock = write.write_pass

    def without_embedding(hidden, layers, weights, *rest):
        return stock(hidden, layers, write.WriteWeights(weights.bos, weights.new_rows * 0), *rest)

    def of_the_next_layer(*arguments):
        return stock(*arguments).roll(-1, 0)

    def embedding_of_a_view_left_out(hidden, layers, weights, tail, *rest):
        new = stock(hidden, layers, weights, tail, *rest)
        if tail is None:
            new[:-1] -= weights.new_rows
        return new

    faults = [without_embedding, of_the_next_layer]
    for fault in [*faults, *([embedding_of_a_view_left_out] if case == "plain" else [])]:
        place = tmp_path / fault.__name__
        place.mkdir()
        model = fresh(converted, case, place)
        monkeypatch.setattr(pools, "write_pass", fault)
        inject(model, wanted["long.ids"], "main", seed=0)
        with Pools.open(place / "memory") as store:
            assert off(store.rows("main"), wanted["long.memory"]) > 1000 * BUDGET, fault.__name__


def test_c8_the_writing_adapter_leaves_with_the_write_whatever_happens(converted, tmp_path, monkeypatch):
    model, wanted = fresh(converted, "adapters", tmp_path), expected("adapters")
    before = logits(model, wanted["prompt"], "main")

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("in the middle of a pass")

    layer = model.get_decoder().layers[2].mlp
    handle = layer.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        inject(model, wanted["long.ids"], "main")
    handle.remove()
    assert torch.equal(logits(model, wanted["prompt"], "main"), before), "reads as before"
    with Pools.open(tmp_path / "memory") as store:
        assert store.info("main").version == 1, "and nothing was written"
    assert inject(model, wanted["long.ids"], "main", seed=0) == "main@2", "the next write works"
    kept = getattr(model, pools.POOLS)
    with pools._writing_adapter(model, kept.factors):
        kept.placed.clear()
        reads = logits(model, wanted["prompt"], "main")
    assert off(reads, wanted["long.logits"]) > 1000 * BUDGET, "the control: reading with the adapter that writes"


def test_what_cannot_be_written_or_read_is_refused(converted, tmp_path, monkeypatch):
    model, wanted = fresh(converted, "plain", tmp_path), expected("plain")
    ids = wanted["long.ids"]
    with pytest.raises(PoolError, match='pool "main" has no rows yet'), read_pool(model, ["main"]):
        pass
    for bad, message in (([], "at least one token"), ([96], "is no token"), ([-1], "is no token")):
        with pytest.raises(ValueError, match=message):
            inject(model, bad)
    monkeypatch.setattr(model.config, "bos_token_id", int(ids[0]))
    with pytest.raises(ValueError, match="begins with BOS"):
        inject(model, ids)
    monkeypatch.setattr(model.config, "bos_token_id", None)
    with pytest.raises(PoolError, match='pool "nobody" is unknown'):
        inject(model, ids, "nobody")
    with read_memory(model, [[]]), pytest.raises(ValueError, match="reads memory now"):
        inject(model, ids)
    with torch.no_grad():
        weight = model.get_decoder().layers[0].mlp.up_proj.weight
        weight[0, 0] = float("nan")
    with pytest.raises(PoolError, match="NaN or infinity, so nothing is written"):
        inject(model, ids)
    assert pools._pools_of(model).reader.info("main").version == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "memoryllm.pools: Field required"),
        (None, "memoryllm.pools: Field required"),
        ({"pools": 3}, "memoryllm.pools: Input is not a valid path"),
        ({"pools": "/nowhere"}, "is no store of pools"),
        ({"pools": "HERE", "chunks": 3}, 'chunks: unknown key. Did you mean "chunk"'),
        ({"pools": "HERE", "chunk": 0}, "chunk: Input should be greater than or equal to 1"),
        ({"pools": "HERE", "gib": 0}, "gib: Input should be greater than 0"),
        ("x", "memoryllm: Input should be a valid dictionary"),
    ],
)
def test_bad_sections(converted, section, message):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted["plain"] / "model")
    if isinstance(section, dict) and section.get("pools") == "HERE":
        section = {**section, "pools": str(converted["plain"] / "memory")}
    with pytest.raises(ConfigError, match=message):
        apply_mem_triton(model, {"memoryllm": section})


def test_pools_of_another_model_and_two_memories(converted, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted["plain"] / "model")
    with pytest.raises(ConfigError, match=r"made for another model .*weights"):
        apply_mem_triton(model, {"memoryllm": {"pools": str(converted["adapters"] / "memory")}})
    with pytest.raises(ConfigError, match="delta: was not tried beside memoryllm"):
        apply_mem_triton(model, {"memoryllm": {"pools": str(converted["plain"] / "memory")}, "delta": {}})
    model = fresh(converted, "plain", tmp_path)
    with pytest.raises(ValueError, match="has pools already"):
        apply_mem_triton(model, {"memoryllm": {"pools": str(tmp_path / "memory")}})
    with pytest.raises(ValueError, match="δ-mem was not tried"):
        apply_mem_triton(model, {"delta": {"adapter": "x"}})
    inject(model, expected("plain")["long.ids"])
    remove_mem_triton(model)
    with pytest.raises(ValueError, match="has no pools"):
        inject(model, [1])
    with Pools.open(tmp_path / "memory", writable=True) as store:
        assert store.info("main").version == 1, "and the store is free for the next writer"
