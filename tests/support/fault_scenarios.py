"""Faults of our own code in workers and schedulers, one after the other in one real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mem_triton.store.bank import Bank
from mem_triton.store.pool.pages import PageLayout
from tests.support.bench import Bench
from tests.support.faults import POOLS, VARIABLE
from tests.support.memory_bench import MemoryBench
from tests.support.memory_scenarios import PROMPTS, Run, answer, ask
from tests.support.pool_bench import PROMPTS as POOL_PROMPTS
from tests.support.pool_bench import TEXTS, PoolBench
from tests.support.pool_scenarios import TWO_VERSIONS, tell
from tests.support.pool_scenarios import ask as pool_ask

ENTRIES = ("beta", "gamma", "delta")
PAGE = 16


def no_exception_of_ours_ends_an_engine(
    m: MemoryBench, bench: Bench, run: Run, places: dict[str, str], tamper: str, folder: Path, **options: Any
) -> None:
    """Whatever raises, each request gives its right answer or fails with the reason, and the next round is right."""
    short, middle, long, _ = PROMPTS
    (folder / "fault").write_text("")
    right = {
        "alpha": answer(bench, m, short, "alpha"),
        "plain": answer(bench, m, middle),
        "session": answer(bench, m, long),
    }

    def batch(number: int) -> list[dict[str, Any]]:
        new = ask(short, 12, ENTRIES[number % len(ENTRIES)])  # its pages are not there yet, as the pool is small
        return [ask(short, 12, "alpha"), ask(middle), ask(long, 12, mem_session=f"s{number}"), new]

    rounds = []
    for number, name in enumerate(places):
        faulty = batch(2 * number)
        faulty[0]["fault"] = name
        rounds += [faulty, batch(2 * number + 1)]
    news = {id: answer(bench, m, short, id) for id in ENTRIES}
    memory = {**bench.memory, **m.section(pool_gib=_room_for(m, "alpha", "delta"))}
    result = run(
        m.model,
        rounds,
        memory=memory,
        tamper=tamper,
        env={VARIABLE: str(folder / "fault")},
        **{"errors_are_results": True, **options},
    )
    for number, given in enumerate(result["rounds"]):
        name, faulty = list(places)[number // 2], number % 2 == 0
        assert isinstance(given, list), f"{name}: {given}"
        expected = [right["alpha"], right["plain"], right["session"], news[ENTRIES[number % len(ENTRIES)]]]
        for tokens, a in zip(expected, given, strict=True):
            if a["tokens"] == tokens:
                continue
            assert faulty, f"after {name}: a wrong answer, {a}"
            assert _failed(a), f"{name}: neither right nor failed, {a}"
        if faulty and name not in QUIET:
            assert any(map(_failed, given)), f"{name}: nothing failed, was it reached?"


def no_exception_of_ours_in_pools_ends_an_engine(b: PoolBench, run: Run, folder: Path, **options: Any) -> None:
    """The same with pools of M+: each round reads a version that does not lie on the device, and writes a text."""
    store = b.store(folder)
    versions = ("main@1", *(b.write(store, text) for text in TEXTS[:2]))
    right = {name: b.answer(store, POOL_PROMPTS[0], name) for name in versions}
    plain = b.answer(store, POOL_PROMPTS[1], None)
    (folder / "fault").write_text("")
    rounds = []
    for number in range(2 * len(POOLS)):
        reads = pool_ask(POOL_PROMPTS[0], versions[number % 3])
        rounds.append([reads, pool_ask(POOL_PROMPTS[1], ""), tell(TEXTS[1])])
        if number % 2 == 0:
            reads["fault"] = list(POOLS)[number // 2]
    memory, env = b.section(store, gib=TWO_VERSIONS), {VARIABLE: str(folder / "fault")}
    tamper = "tests.support.faults:install_pools"
    result = run(b.model, rounds, memory=memory, tamper=tamper, env=env, errors_are_results=True, **options)
    for number, given in enumerate(result["rounds"]):
        name, faulty = list(POOLS)[number // 2], number % 2 == 0
        assert isinstance(given, list), f"{name}: {given}"
        for tokens, a in zip((right[versions[number % 3]], plain, []), given, strict=True):
            assert (a["tokens"] == tokens and not _failed(a)) or (faulty and _failed(a)), f"{name} ({faulty}): {a}"
        if faulty and name not in QUIET:
            assert any(map(_failed, given)), f"{name}: nothing failed, was it reached?"


def _room_for(m: MemoryBench, *entries: str) -> float:
    """GiB of a pool that holds these entries and nothing else, so that each of ``ENTRIES`` in its turn is loaded."""
    with Bank.open(m.prefixes) as bank:
        of = bank.spec
        pages = sum(-(-bank.resolve(id).tokens // PAGE) for id in entries)
    return (pages + 0.5) * PageLayout(len(of.layers), of.kv_heads, of.head_dim, PAGE, torch.float32).page_bytes / 2**30


QUIET = {
    "leave states",
    "leave tables",
    "leave a pool",
    "block keys",
    "radix keys",
    "take a state",
    "order of steps",
    "places",
}
"""Places whose failure costs no answer."""


def _failed(a: dict[str, Any]) -> bool:
    finish = a["finish"]
    kind = finish["type"] if isinstance(finish, dict) else finish
    return kind in ("error", "abort")
