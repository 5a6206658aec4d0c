"""The benchmarks of MemoryLLM's pools: their gates, and what they make of times."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.engines import made_up, memories, official, writing
from benchmarks.engines.gate import Oracle
from mem_triton.systems.memoryllm.pools import Pools
from tests.benchmarks.test_engines import engine

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = 512


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_up.make_model("llama-tiny", tmp_path_factory.mktemp("made"), torch.float32)


def test_an_engine_that_reads_no_pool_is_red_and_one_that_need_not_is_green(made, tmp_path):
    oracle = Oracle(made.model, exact=True)
    reads, idle = (memories.make_memory(n, made, tmp_path / n, ROWS) for n in ("memoryllm", "memoryllm unread"))
    assert reads.section["memoryllm"]["default"] == "main" and idle.section["memoryllm"]["default"] is None
    right = oracle.judge(engine(made, reads, oracle.prompts), reads)
    assert right.green and right.effect > 0.01, right
    plain = engine(made, None, oracle.prompts)
    assert not oracle.judge(plain, reads).green
    assert (green := oracle.judge(plain, idle)).green and green.effect is None
    assert not oracle.judge(engine(made, reads, oracle.prompts), idle).green


def test_answers_of_version_1_are_those_of_its_rows(made, tmp_path):
    store = made_up.make_store(made, tmp_path, ROWS)
    prompts = [made_up.random_ids(9, 12000, 1)]
    before = writing.right_answers(made, store, prompts, 4)
    with Pools.open(store, writable=True) as pools, pools.writing("main") as write:
        write.apply(torch.randn(2, 256, 128))
        write.commit()
    assert writing.right_answers(made, store, prompts, 4) == before


class Served:
    """A server whose tokens come every 10 ms, and one in ``gaps`` of them 50 ms later while a pool is written."""

    def __init__(self, name: str, wrong: bool = False) -> None:
        self.server, self.http, self.wrong = SimpleNamespace(name=name, url="u"), self, wrong
        self.written = 0

    async def post(self, url: str, json: dict) -> SimpleNamespace:
        await asyncio.sleep(0)
        writes = "mem_inject" in json["vllm_xargs"]
        self.written += writes
        said = [9] if self.wrong and self.written > 1 and not writes else [5]
        choice = {"choices": [{"token_ids": said}]}
        return SimpleNamespace(status_code=200, json=lambda: choice)

    async def times(self, tokens: int, fields: dict) -> list[float]:
        before = self.written
        await asyncio.sleep(0.01)
        late = 0.05 if self.written > before else 0.0
        return [0.01 * i + late * (i > 50) for i in range(tokens)]

    async def answer(self, tokens: int, fields: dict) -> None:
        await asyncio.sleep(30)


def measured(monkeypatch, wrong: bool):
    sides = {name: Served(name, wrong) for name in writing.SIDES}
    monkeypatch.setattr(writing, "Client", lambda server, http, seed: sides[server.name])
    monkeypatch.setattr(writing, "EVERY", 0.001)
    monkeypatch.setattr(writing, "REST", 0)
    args = SimpleNamespace(text=4, others=1, probes=3, rounds=2)
    return asyncio.run(writing.measure([s.server for s in sides.values()], args, 100, [[5]], [[1, 2]]))


def test_waits_are_told_as_ratios_of_one_round_and_wrong_answers_end_it(monkeypatch):
    monkeypatch.setattr(writing, "ANSWER", 96)
    found, took = measured(monkeypatch, wrong=False)
    for name, parts in found.items():
        told = writing.summary(parts, took[name])
        assert [len(rounds) for rounds in parts.values()] == [2, 2] and told["writes"] >= 2
        assert told["quiet"]["p99_ms"] == pytest.approx(10) and told["longest_ms"]["written"] == pytest.approx(60)
        assert told["p99_with_to_without"] == pytest.approx(6, rel=0.01)
    with pytest.raises(writing.BenchmarkError, match="while its pool is written"):
        measured(monkeypatch, wrong=True)


def test_official_sides_are_measured_in_turns_and_pairs_are_told(monkeypatch):
    monkeypatch.setattr(official, "REST", 0)
    ran: list[tuple[str, int]] = []
    sides = {
        "baseline": lambda i: (ran.append(("a", i)), 4.0)[1],
        "memory": lambda i: (ran.append(("o", i)), 1.0 + i)[1],
    }
    told = official._in_turns(sides, 3)
    assert "".join(side for side, _ in ran) == "ao" + "aooaao" and told["ours"] == [1.0, 2.0, 3.0]
    assert told["ratio"]["median"] == 0.5 and told["authors"] == [4.0] * 3


@pytest.mark.parametrize("path", sorted(RESULTS.glob("official-*.json")), ids=lambda path: path.stem)
def test_what_is_kept_of_the_authors_code_stood_behind_its_gate(path):
    report = json.loads(path.read_text())
    assert report["gate"]["gate"] == "green" and report["gate"]["rows"] < official.ROWS
    assert all(len(row["ours"]) == len(row["authors"]) for row in report["rows"].values())
