"""The courses of ``benchmarks.memo.learning``: what is taught, what is asked, and how answers are counted."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.server import BenchmarkError
from benchmarks.memo import learned, learning
from benchmarks.memo.corpora import WORLD, memory_rows, row, strangers
from benchmarks.memo.learned import Examiner, School, fact_rows, facts_of, parts_of, stranger_rows, world_of
from benchmarks.memo.world import UNKNOWN
from mem_triton_transformers.memo_training.packing import tokens_of
from tests.support.models import save_tiny_model


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_two_parts_of_a_world_are_all_of_it_and_neither_is_taught_with_the_other(share):
    world = world_of(112, 3)
    parts = parts_of(world, share)
    assert sorted((*parts[0], *parts[1])) == sorted(world.facts) and facts_of(world, parts[0]) == 112 * share
    for part, other in (parts, parts[::-1]):
        taught = list(memory_rows(world, 2, part))
        known = [one for one in taught if one["completion"][0]["content"] != UNKNOWN]
        assert {world.sentence(n, r) for n in part for r in world.facts[n]} <= {
            one["completion"][0]["content"] for one in known
        }
        subjects = [name for name in other if any(asked(one).count(name) for one in taught)]
        assert subjects == [], "nobody of the other part is asked about, not as a stranger either"
    whole = [asked(one) for one in memory_rows(world, 2)]
    assert [name for name in parts[1] if any(name in text for text in whole)] == parts[1], "negative control"


def test_what_is_asked_is_never_taught():
    world = world_of(42, 1)
    taught = {asked(one) for one in memory_rows(world)}
    kept = [*fact_rows(world, world.facts), *stranger_rows(world)]
    assert len(kept) > 100 and not [one for one in kept if asked(one) in taught]


def test_a_world_of_more_facts_than_there_are_names_for_is_refused():
    assert facts_of(WORLD, WORLD.facts) == facts_of(world_of(98, 0), WORLD.facts) == 98
    for facts in (0, 5000):
        with pytest.raises(BenchmarkError, match=f"--facts {facts}"):
            world_of(facts, 0)
    largest = world_of(980, 0)
    assert all(map(len, strangers(largest))), "there are strangers left"


def test_exact_answers_are_those_of_greedy_decoding_and_nothing_is_trained_twice(model, tmp_path, monkeypatch):
    rows = [row(f"k{i}?", str(i % 3)) for i in range(8)]
    school = School(model, tmp_path, ("--preset", "small", "--epochs", "8", "--dtype", "float32", "--batch", "4"))
    adapter, told = school.learn(rows)
    assert told["rows"] == 8 and (adapter / "adapter_model.safetensors").is_file()
    examiner = Examiner(model)
    found = [examiner.exact(adapter, [one])["exact"] for one in rows]
    assert examiner.exact(adapter, rows)["exact"] == sum(found) > 0
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    for one, exact in zip(rows, found, strict=True):
        wanted = tokens_of(tokenizer, *learned.as_rows([one]), 1024)
        ids = torch.tensor([wanted.ids[: -wanted.answer]])
        said = adapted.generate(ids, max_new_tokens=wanted.answer, do_sample=False)[0, ids.shape[1] :]
        assert exact == (said.tolist() == list(wanted.ids[-wanted.answer :]))
    monkeypatch.setattr(learned.subprocess, "run", None)
    assert school.learn(rows) == (adapter, told)


@pytest.mark.slow
def test_a_course_of_two_corpora_says_every_method_s_figure(model, tmp_path, monkeypatch):
    """On a tiny random model, that learns next to nothing in an epoch."""
    monkeypatch.setattr(learning, "CACHE", tmp_path)
    monkeypatch.setattr(learning, "make", lambda kind, folder, dtype: folder.symlink_to(model) or folder)
    monkeypatch.setattr(learning.record, "save", lambda report, name: kept.append(report) or learning.record.ROOT / "x")
    kept: list[dict] = []
    learning.merge(facts=14, epochs=1, rank=2, seed=0, save=True)
    (report,) = json.loads(json.dumps(kept))
    assert report["facts"] == 28 and len(report["models"]) == 3 + 6
    for found in report["models"].values():
        assert {"first", "second", "unknown"} == set(found["asked"]) and found["asked"]["first"]["rows"] == 28
