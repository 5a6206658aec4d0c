"""What every engine must do with MemoryLLM's pools, written once; transformers with the same store is the oracle.

run: an engine's ``run_engine``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mem_triton.systems.memoryllm.pools import Pools
from tests.support.cases import cached, tokens
from tests.support.pool_bench import PROMPTS, TEXTS, PoolBench, off, rows_of, unmerged_of

Run = Callable[..., Any]
LOGPROBS = 3.6e-5
"""Largest difference of a log-probability, as the trial with adapters had it."""
TWO_VERSIONS = 0.0004
"""GiB that hold keys and values of two versions."""
ROWS = 1e-5
"""Largest difference of rows, as a part of their largest number."""


def ask(prompt: list[int], pool: str | None = None, count: int = 12, **fields: Any) -> dict[str, Any]:
    """A request that reads a pool; None: says nothing."""
    said = {**({} if pool is None else {"mem_pool": pool}), **fields}
    return {"prompt": prompt, "max_tokens": count, "logprobs": 1, **({"fields": said} if said else {})}


def tell(text: list[int], pool: str = "main", **fields: Any) -> dict[str, Any]:
    """A request that writes a text."""
    return {"prompt": text, "max_tokens": 1, "fields": {"mem_inject": pool, **fields}}


def same_scores(answer: dict[str, Any], wanted: tuple[list[int], list[float]]) -> None:
    made, scores = wanted
    assert answer["tokens"] == made
    if answer.get("logprobs") is None:  # an engine's case that gives none
        return
    got = [step[str(token)] for step, token in zip(answer["logprobs"], made, strict=True)]
    worst = max(abs(a - b) for a, b in zip(got, scores, strict=True))
    assert worst < LOGPROBS, worst


def every_row_reads_its_own_version(b: PoolBench, tmp_path: Path, run: Run, page: int, **options: Any) -> None:
    """Versions and none in one batch, chunked prefill, prefix-cache hits of the same version alone."""
    store = b.store(tmp_path)
    b.write(store, TEXTS[0])
    short, middle, long, edge = PROMPTS
    first = [ask(short), ask(middle, "main@1"), ask(long), ask(edge, "")]
    other = [ask(short, "main@1"), ask(middle, ""), ask(long, "main@1"), ask(edge, "main")]
    result = run(b.model, [first, first, other], memory=b.section(store), **options)
    pools = {0: ["main@2", "main@1", "main@2", None], 2: ["main@1", None, "main@1", "main@2"]}
    wanted = {i: [b.scored(store, p, pool) for p, pool in zip(PROMPTS, pools[i], strict=True)] for i in pools}
    for index, right in ((0, wanted[0]), (1, wanted[0]), (2, wanted[2])):
        for answer, expected in zip(result["rounds"][index], right, strict=True):
            same_scores(answer, expected)
    for index in (0, 2):
        said = [(answer["memory"] or {}).get("pool") for answer in result["rounds"][index]]
        assert said == [None if pool is None else {"id": pool} for pool in pools[index]]
    assert cached(result, 1) == [(len(p) - 1) // page * page for p in PROMPTS], "the same version shares its pages"
    assert cached(result, 2) == [0] * 4, "another version, or none, shares nothing"
    assert len({tuple(b.answer(store, long, pool)) for pool in ("main@1", "main@2", None)}) == 3, "it matters"


def texts_are_written_and_read(
    b: PoolBench, tmp_path: Path, run: Run, beside: dict[str, Any] | None = None, **options: Any
) -> None:
    """Each write's rows, and answers with its version; then all versions at once, of which the device holds two.

    beside: other sections of the configuration.
    """
    there, here = (b.store(tmp_path / name) for name in ("transformers", "engine"))
    first = rows_of(there, "main") if b.initialized else None
    rounds: list[list[dict[str, Any]]] = []
    for seed, text in enumerate(TEXTS):
        rounds += [[tell(text, mem_seed=seed)], [ask(PROMPTS[1]), ask(PROMPTS[2])]]
    version = 0 if first is None else 1
    names = [f"main@{version + 1 + i}" for i in range(len(TEXTS))]
    rounds.append([ask(PROMPTS[0], name) for name in names])
    section = b.section(here, chunk=32, gib=TWO_VERSIONS) | (beside or {})
    result = run(b.model, rounds, memory=section, **options)
    for seed, text in enumerate(TEXTS):
        version += 1
        name = b.write(there, text, seed=seed, chunk=32)
        (told,), answers = result["rounds"][2 * seed], result["rounds"][2 * seed + 1]
        assert name == f"main@{version}" and told["tokens"] == []
        assert told["finish"] in ("stop", {"type": "stop", "matched": None})
        pool = {"id": name, "tokens": len(text), "chunks": -(-len(text) // 32)}
        note = told["memory"]["pool"].pop("note", None)
        assert told["memory"] == {"pool": pool} and (note is not None) == (len(text) < 16)
        found = off(rows_of(here, name), rows_of(there, name))
        assert found < ROWS, (name, found)
        for answer, prompt in zip(answers, PROMPTS[1:3], strict=True):
            same_scores(answer, b.scored(there, prompt, name))
    assert off(rows_of(here, "main"), rows_of(here, f"main@{version - 1}")) > 1000 * ROWS, "it matters"
    for answer, name in zip(result["rounds"][-1], names, strict=True):
        same_scores(answer, b.scored(there, PROMPTS[0], name))
    assert len({tuple(answer) for answer in tokens(result, len(rounds) - 1)}) > 1


def without_pools_in_the_cache_keys_wrong_tokens_appear(
    b: PoolBench, tmp_path: Path, run: Run, tamper: str, **options: Any
) -> None:
    """Negative control of C6: the prefix of another version is found."""
    store = b.store(tmp_path)
    b.write(store, TEXTS[0])
    rounds = [[ask(PROMPTS[2], "main@1")], [ask(PROMPTS[2], "main@2")]]
    result = run(b.model, rounds, memory=b.section(store), tamper=tamper, **options)
    assert tokens(result, 0) == [b.answer(store, PROMPTS[2], "main@1")]
    assert tokens(result, 1) != [b.answer(store, PROMPTS[2], "main@2")]


def reading_with_the_writing_adapter_gives_other_tokens(
    b: PoolBench, tmp_path: Path, run: Run, tamper: str, **options: Any
) -> None:
    """Negative control of C8."""
    store = b.store(tmp_path)
    result = run(b.model, [[ask(PROMPTS[2])]], memory=b.section(store), tamper=tamper, **options)
    assert tokens(result) != [b.answer(store, PROMPTS[2], "main@1")]


def versions_are_read_in_turn(b: PoolBench, tmp_path: Path, run: Run, tamper: str = "", **options: Any) -> None:
    """C2: with room for one version, two requests on it go together, and one on another waits for its turn. Control:
    what is read can be taken away."""
    store = b.store(tmp_path)
    b.write(store, TEXTS[0])
    batch = [ask(PROMPTS[0], "main@1", 40), ask(PROMPTS[1], "main@1", 40), ask(PROMPTS[2], "main@2", 8)]
    more = {"errors_are_results": True, "tamper": tamper} if tamper else {}
    result = run(b.model, [batch], memory=b.section(store, gib=TWO_VERSIONS / 2), **more, **options)
    right = [b.answer(store, PROMPTS[0], "main@1", 40), b.answer(store, PROMPTS[1], "main@1", 40)]
    right.append(b.answer(store, PROMPTS[2], "main@2", 8))
    answers = result["rounds"][0]
    assert (isinstance(answers, list) and tokens(result) == right) == (not tamper)


def the_adapter_that_reads_is_served_as_lora(b: PoolBench, tmp_path: Path, run: Run, **options: Any) -> None:
    """Of an unmerged checkpoint: rows and answers are those of the merged one. Control: without it tokens differ."""
    there, folder = b.store(tmp_path / "transformers"), unmerged_of(b, tmp_path / "apart")
    read = {"lora": str(folder / "read")}
    section = {"memoryllm": {"pools": str(folder / "memory"), "gib": 0.01}}
    rounds = [
        [ask(prompt) | read for prompt in PROMPTS[:3]],
        [tell(TEXTS[0], mem_seed=0)],
        [ask(PROMPTS[1]) | read, ask(PROMPTS[2], "main@1") | read],
        [ask(PROMPTS[2], "")],
    ]
    result = run(folder / "model", rounds, memory=section, **options)
    before = [(PROMPTS[i], "main@1") for i in range(3)]
    name = b.write(there, TEXTS[0], seed=0)
    for index, asked in ((0, before), (2, [(PROMPTS[1], name), (PROMPTS[2], "main@1")])):
        for answer, (prompt, version) in zip(result["rounds"][index], asked, strict=True):
            same_scores(answer, b.scored(there, prompt, version))
    assert off(rows_of(folder / "memory", name), rows_of(there, name)) < ROWS
    assert tokens(result, 3) != [b.answer(there, PROMPTS[2], None)]


def prompts_choose_long_term_rows(b: PoolBench, tmp_path: Path, run: Run, **options: Any) -> None:
    """C9, C7: versions and none in one batch, each with the rows that its prompt chooses, before and after merges."""
    store = b.store(tmp_path)
    for seed, text in enumerate(TEXTS[:3]):
        b.write(store, text, seed=seed)
    names = ["main", "main@1", "main@2", "main@3", "", "main", "main@3", "main"]
    prompts = [*PROMPTS, *PROMPTS]
    batch = [ask(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    result = run(b.model, [batch, [batch[2]], [batch[7], batch[0]]], memory=b.section(store), **options)
    wanted = [b.scored(store, prompt, name or None) for prompt, name in zip(prompts, names, strict=True)]
    chosen = [wanted, [wanted[2]], [wanted[7], wanted[0]]]
    for answers, right in zip(result["rounds"], chosen, strict=True):
        for answer, expected in zip(answers, right, strict=True):
            same_scores(answer, expected)
    assert cached(result, 1) == [0] and cached(result, 2) == [0, 0], "what a prompt chose is its own"
    assert len({tuple(b.answer(store, PROMPTS[2], name)) for name in ("main@1", "main@2", "main@3", "main")}) == 4


def long_term_rows_are_written(b: PoolBench, tmp_path: Path, run: Run, **options: Any) -> None:
    """C3, C11: each write's rows and long-term memory, over merges, and answers with its version."""
    there, here = (b.store(tmp_path / name) for name in ("transformers", "engine"))
    rounds: list[list[dict[str, Any]]] = []
    for seed, text in enumerate(TEXTS):
        rounds += [[tell(text, mem_seed=seed)], [ask(PROMPTS[1]), ask(PROMPTS[3])]]
    result = run(b.model, rounds, memory=b.section(here, chunk=32), **options)
    for seed, text in enumerate(TEXTS):
        name = b.write(there, text, seed=seed, chunk=32)
        (told,), answers = result["rounds"][2 * seed], result["rounds"][2 * seed + 1]
        assert told["memory"]["pool"]["id"] == name and told["tokens"] == []
        same_state(here, there, name)
        for answer, prompt in zip(answers, (PROMPTS[1], PROMPTS[3]), strict=True):
            same_scores(answer, b.scored(there, prompt, name))


def same_state(here: Path, there: Path, name: str) -> None:
    """A version's rows and its long-term memory are those of another store."""
    with Pools.open(here) as one, Pools.open(there) as other:
        mine, theirs = one.state(name), other.state(name)
    assert off(mine.rows, theirs.rows) < ROWS
    for layer in range(len(mine.rows)):
        assert mine.long_term.count(layer) == theirs.long_term.count(layer)
        pairs = zip(mine.long_term.rows(layer), theirs.long_term.rows(layer), strict=True)
        for part, wanted in pairs:
            assert off(part.content[0], wanted.content[0]) < ROWS and off(part.keys, wanted.keys) < ROWS
            assert torch.equal(part.frequencies, wanted.frequencies)
        assert torch.equal(mine.long_term.ages_of(layer), theirs.long_term.ages_of(layer))


def other_rows_give_other_tokens(b: PoolBench, tmp_path: Path, run: Run, tamper: str, **options: Any) -> None:
    """Negative control of C9."""
    store = b.store(tmp_path)
    for seed, text in enumerate(TEXTS[:3]):
        b.write(store, text, seed=seed)
    result = run(b.model, [[ask(PROMPTS[1])]], memory=b.section(store), tamper=tamper, **options)
    assert tokens(result) != [b.answer(store, PROMPTS[1], "main")]
