"""What every engine's HTTP server must do with MemoryLLM's pools: tests that each engine's file imports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mem_triton.systems.memoryllm.pools import Pools
from tests.support.pool_bench import BOS, PROMPTS, TEXTS, PoolBench, off, rows_of, tokens_of
from tests.support.pool_engine_scenarios import pool_bench as pool_bench
from tests.support.pool_scenarios import ROWS
from tests.support.server import ServerProcess, at_once, until


@pytest.fixture(scope="module")
def store(pool_bench: PoolBench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a pool of a tenant's own, which no other finds."""
    store = pool_bench.store(tmp_path_factory.mktemp("store"))
    with Pools.open(store, writable=True) as pools:
        pools.add("hidden", pools.rows("main"), "secret")
    return store


@pytest.fixture(scope="module")
def server(pool_bench: PoolBench, store: Path, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server(pool_bench.model, pool_bench.section(store, chunk=32, versions=2, layers_per_step=1))


def tell(server: ServerProcess, text: list[int], pool: str = "main", **fields: Any) -> httpx.Response:
    return server.complete(text, 1, fields={"mem_inject": pool, **fields})


def newest(store: Path, pool: str = "main", tenant: str = "") -> str:
    with Pools.open(store) as pools:
        return pools.exact(pool, tenant).id


def streamed(server: Any, prompt: list[int], count: int, fields: dict[str, Any]) -> list[int]:
    """All tokens of a stream: an engine's client gives those of each part, or SGLang's answers with all so far."""
    parts = list(server.stream(prompt, count, fields))
    if parts and isinstance(parts[-1], dict):
        return parts[-1]["output_ids"]
    return [token for part in parts for token in part]


def test_c3_c8_a_text_is_written_and_read(
    server: ServerProcess, pool_bench: PoolBench, store: Path, tmp_path: Path
) -> None:
    """Rows on the disk are those of transformers, in chunks, and the answer has no tokens."""
    twin = Path(shutil.copytree(store, tmp_path / "twin"))
    before = newest(store)
    response = tell(server, TEXTS[3], mem_seed=7)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["choices"][0]["text"] == "" and answer["usage"]["completion_tokens"] == 0
    written = pool_bench.write(twin, TEXTS[3], seed=7, chunk=32)
    assert server.report(response) == {"pool": {"id": written, "tokens": len(TEXTS[3]), "chunks": 3}}
    assert off(rows_of(store, written), rows_of(twin, written)) < ROWS
    assert server.tokens(PROMPTS[1]) == pool_bench.answer(store, PROMPTS[1], written)
    assert server.tokens(PROMPTS[1], fields={"mem_pool": before}) == pool_bench.answer(store, PROMPTS[1], before)
    assert server.tokens(PROMPTS[1], fields={"mem_pool": ""}) == pool_bench.answer(store, PROMPTS[1], None)
    assert server.report(server.complete(PROMPTS[1])) == {"pool": {"id": written}}


def test_streams_write(server: Any, store: Path) -> None:
    """A stream ends without a token, when the write is on the disk."""
    before = newest(store)
    assert streamed(server, TEXTS[0], 4, {"mem_inject": "main"}) == []
    assert newest(store) != before


def test_chats_write_and_read(server: ServerProcess) -> None:
    told = server.chat("The key is with Ada.", fields={"mem_inject": "main"}, logprobs=True)
    assert told.json()["choices"][0]["message"]["content"] in ("", None), told.text
    assert server.report(told)["pool"]["tokens"] == told.json()["usage"]["prompt_tokens"]
    assert server.report(server.chat("Who has it?"))["pool"]["id"] == server.report(told)["pool"]["id"]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"mem_pool": "nobody"}, {}, "nobody"),
    ({"mem_pool": "main@99"}, {}, "gone or not there yet"),
    ({"mem_pool": "../main"}, {}, "mem_pool: names no pool"),
    ({"mem_pool": 3}, {}, "mem_pool: names no pool"),
    ({"mem_pool": "hidden"}, {}, "hidden"),
    ({"mem_pool": "hidden", "mem_tenant": "other"}, {}, "hidden"),
    ({"mem_inject": "hidden"}, {}, "mem_inject"),
    ({"mem_inject": "main", "mem_tenant": "acme"}, {}, "mem_inject"),
    ({"mem_inject": "a b"}, {}, "mem_inject: must be the name"),
    ({"mem_inject": "main@1"}, {}, "mem_inject: must be the name"),
    ({"mem_inject": "nobody"}, {}, "mem_fork begins a new one"),
    ({"mem_inject": "main", "mem_fork": "main"}, {}, "is taken"),
    ({"mem_inject": "new", "mem_fork": "hidden"}, {}, "mem_fork"),
    ({"mem_fork": "main"}, {}, "mem_fork: belongs to a write"),
    ({"mem_seed": 1}, {}, "mem_seed: belongs to a write"),
    ({"mem_inject": "main", "mem_seed": -1}, {}, "mem_seed: must be a whole number"),
    ({"mem_inject": "main", "mem_pool": "main"}, {}, "mem_pool: does not go together"),
    ({"mem_inject": "main", "mem_ids": ["x"]}, {}, "mem_ids"),
    ({"mem_inject": "main", "mem_session": "x"}, {}, "mem_session"),
    ({"mem_inject": "main", "mem_capture": "x"}, {}, "mem_capture"),
    ({"mem_inject": "main"}, {"n": 2, "temperature": 1.0}, "does not go together with n"),
    ({"mem_inject": "main"}, {"stop": ["x"]}, "stop strings"),
]


@pytest.mark.parametrize(("fields", "others", "message"), BAD)
def test_bad_fields_are_400(
    server: ServerProcess, store: Path, fields: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    before = newest(store)
    response = server.complete(TEXTS[0], 1, fields=fields, **others)
    assert response.status_code == 400 and message in response.text, response.text
    assert newest(store) == before


def test_a_text_that_cannot_be_written_is_400(server: ServerProcess) -> None:
    for text, message in (([BOS, *TEXTS[0]], "begins with BOS (3)"), ([*TEXTS[0], 512], "512")):
        response = tell(server, text)
        assert response.status_code == 400 and message in response.text, response.text


def test_c6_tenants_have_pools_of_their_own(server: ServerProcess, pool_bench: PoolBench, store: Path) -> None:
    """C6: a fork, a write and a read of one tenant are nothing to another, nor through the prefix cache."""
    mine, other = {"mem_tenant": "acme"}, {"mem_tenant": "other"}
    forked = tell(server, TEXTS[0], "draft", mem_fork="main@1", mem_seed=1, **mine)
    assert server.report(forked)["pool"]["id"] == "draft@2", forked.text
    prompt = PROMPTS[3]
    right = [pool_bench.answer(store, prompt, "main@1")]
    with Pools.open(store) as pools:
        rows = pools.rows("draft@2", "acme")
    assert off(rows, rows_of(store, "main@1")) > 1000 * ROWS
    answers = [server.tokens(prompt, fields={"mem_pool": "draft", **mine}) for _ in range(2)]
    assert answers[0] == answers[1] != right[0]
    assert server.complete(prompt, fields={"mem_pool": "draft", **other}).status_code == 400
    assert server.complete(prompt, fields={"mem_pool": "draft"}).status_code == 400
    assert tell(server, TEXTS[0], "draft", **other).status_code == 400
    assert server.tokens(prompt, fields={"mem_pool": "main@1", **other}) == right[0]


def test_running_requests_keep_their_version(server: ServerProcess, pool_bench: PoolBench, store: Path) -> None:
    """While three answers run that read three versions, texts are written; each answer is its version's."""
    prompt, count = PROMPTS[0], 48
    found: list[tuple[str, list[int]]] = []

    def run(version: str) -> None:
        found.append((version, streamed(server, prompt, count, {"mem_pool": version})))

    threads = []
    for seed in range(3):
        version = newest(store)
        threads.append(threading.Thread(target=run, args=(version,)))
        threads[-1].start()
        assert tell(server, TEXTS[seed], mem_seed=seed).status_code == 200
    for thread in threads:
        thread.join()
    assert len({version for version, _ in found}) == 3
    for version, tokens in found:
        assert tokens == pool_bench.answer(store, prompt, version, count), version


def test_writes_come_one_after_the_other(
    server: ServerProcess, pool_bench: PoolBench, store: Path, tmp_path: Path
) -> None:
    """Of texts that are told at once, each is written into what the one before it left."""
    twin, before = Path(shutil.copytree(store, tmp_path / "twin")), int(newest(store).partition("@")[2])
    texts = [tokens_of(70 + i, 20 + i) for i in range(4)]
    told = at_once(4, lambda i: tell(server, texts[i], mem_seed=i))
    ids = [server.report(response)["pool"]["id"] for response in told]
    assert sorted(int(id.partition("@")[2]) for id in ids) == [before + 1 + i for i in range(4)]
    for i in sorted(range(4), key=lambda i: int(ids[i].partition("@")[2])):
        assert pool_bench.write(twin, texts[i], seed=i) == ids[i]
    assert off(rows_of(store, "main"), rows_of(twin, "main")) < 10 * ROWS, "four times"


def test_a_client_that_leaves_loses_nothing(server: ServerProcess, store: Path) -> None:
    """The write goes on, or is not there; the next one follows."""
    for patience in (0.001, 0.01, 0.05):
        with contextlib.suppress(httpx.TimeoutException):
            server.complete(tokens_of(90, 200), 1, fields={"mem_inject": "main"}, patience=patience)
    response = tell(server, TEXTS[0])
    assert server.report(response)["pool"]["id"] == newest(store)
    with Pools.open(store) as pools:
        assert pools.verify() == []


def test_what_cannot_be_stored_is_not_acknowledged(server: ServerProcess, pool_bench: PoolBench, store: Path) -> None:
    """As a full disk: the file of the next version cannot be written. Later writes work."""
    before = newest(store)
    number = int(before.partition("@")[2]) + 1
    obstacle = store / "pools" / "main" / f".writing-{number:010d}.delta.safetensors"
    obstacle.mkdir()
    failures = server.metric("mem_triton:pool_write_failures_total")
    try:
        response = tell(server, TEXTS[0])
        assert response.status_code in (500, 507) and "the pool is as it was" in response.text, response.text
        forked = tell(server, TEXTS[0], "half", mem_fork="main")
        assert forked.status_code == 200, "another pool has room"
        assert newest(store) == before
        assert server.tokens(PROMPTS[0]) == pool_bench.answer(store, PROMPTS[0], before)
    finally:
        obstacle.rmdir()
    assert server.metric("mem_triton:pool_write_failures_total") == failures + 1
    assert server.report(tell(server, TEXTS[0]))["pool"]["id"] == f"main@{number}"


def test_others_change_the_store_between_writes(server: ServerProcess, pool_bench: PoolBench, store: Path) -> None:
    """As `mem-triton pool` does: a fork is readable at once, and writes go on behind a compaction."""
    server.report(tell(server, TEXTS[0]))
    with Pools.open(store, writable=True, wait=10) as pools:
        pools.fork("aside", "main")
        pools.compact("main")
    assert server.tokens(PROMPTS[0], fields={"mem_pool": "aside"}) == pool_bench.answer(store, PROMPTS[0], "aside")
    written = server.report(tell(server, TEXTS[1]))["pool"]["id"]
    assert server.tokens(PROMPTS[0]) == pool_bench.answer(store, PROMPTS[0], written)


def test_a_writer_waits_until_its_readers_have_ended(server: ServerProcess, pool_bench: PoolBench, store: Path) -> None:
    """With two versions at most: the third is not there before a reader of one of the others has ended."""
    waits = server.metric("mem_triton:pool_writer_waits_total")
    versions, streams = [], []
    for seed in range(2):
        versions.append(newest(store))
        streams.append(server.stream(PROMPTS[0], 400, {"mem_pool": versions[-1]}))
        next(streams[-1])
        if seed == 0:
            assert tell(server, TEXTS[0]).status_code == 200
    writing = threading.Thread(target=tell, args=(server, TEXTS[1]))
    writing.start()
    until(lambda: server.metric("mem_triton:pool_writer_waits_total") > waits, "nobody waits")
    assert newest(store) == versions[1]
    assert server.tokens(PROMPTS[1]) == pool_bench.answer(store, PROMPTS[1], versions[1]), "readers do not wait"
    for stream in streams:
        stream.close()
    writing.join()
    assert newest(store) != versions[1]


def test_a_killed_worker_takes_nothing_that_was_acknowledged(server: ServerProcess, store: Path) -> None:
    """The engine dies while texts come in: what was told is there, and no half of another.

    The last test of a server.
    """
    said: list[str] = []

    def keep_telling() -> None:
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            while True:
                said.append(server.report(tell(server, TEXTS[0]))["pool"]["id"])

    teller = threading.Thread(target=keep_telling)
    teller.start()
    until(lambda: len(said) >= 2, "nothing is written")
    for child in psutil.Process(server.process.pid).children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)
    teller.join()
    with Pools.open(store, writable=True, wait=30) as pools:
        assert pools.verify() == []
        assert pools.exact("main").version >= int(said[-1].partition("@")[2])
        assert pools.exact("main").version <= int(said[-1].partition("@")[2]) + 1
