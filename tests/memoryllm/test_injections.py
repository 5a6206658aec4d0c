"""Writes of a front end without an engine: in order, whole or not at all, and told when they are on the disk."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from mem_triton.store.errors import not_written
from mem_triton.systems.base import FrontendServices
from mem_triton.systems.memoryllm import writing
from mem_triton.systems.memoryllm.frontend import PoolFrontEnd
from mem_triton.systems.memoryllm.injections import Injecting
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.request import parse
from mem_triton.systems.memoryllm.rows import to_bytes
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.worker import NOTHING
from mem_triton.systems.memoryllm.write import WritePass, WriteWeights, write_pass
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import RequestPayload, keys_between
from mem_triton.systems.request import RequestError
from tests.memoryllm.test_serving import engine
from tests.support.pool_bench import BOS, PoolBench, make_pool_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("pools"))


class Workers:
    """Two workers of each stage, of whom the first gives rows, a layer a call. broken: a call that one cannot do."""

    def __init__(self, broken: str = "", value: float = 0.5, spans: tuple[tuple[int, int], ...] = ((0, 3),)) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.broken, self.value, self.ends, self.layers = broken, value, dict(spans), range(0)

    async def __call__(self, call: str, *args: Any) -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        self.told.append((call, *args))
        said = {**NOTHING, "error": "cannot" if call == self.broken else None}
        if call == "write":
            self.layers = range(args[1], self.ends[args[1]])
            self.size = len(self.layers)
        if call not in ("write", "write_on"):
            return [dict(NOTHING), said]
        self.layers = self.layers[1:]
        said["left"] = len(self.layers)
        over = {"new": to_bytes(torch.full((self.size, 16, 128), self.value)), "text": b"left"}
        return [{**said, "error": None, **({} if self.layers else over)}, said]

    @property
    def calls(self) -> list[str]:
        return [call for call, *_ in self.told]


def front_of(bench: PoolBench, store: Any, shape: Any = None, **section: Any) -> PoolFrontEnd:
    section = {"gib": 0.01, "layers_per_step": 1, **section}
    return PoolFrontEnd(shape or engine(bench), MemoryLLMSection(pools=store, **section), FrontendServices())


async def tell(front: PoolFrontEnd, workers: Workers, ids: list[int], tenant: str = "", **fields: Any) -> Injecting:
    memory = front.admit(parse({"mem_inject": "main", **fields}, tenant), RequestParams())
    await front.prepare(memory, ids, workers)
    await front.injections.write(memory, workers)
    return memory


def test_a_write_is_on_the_disk_before_a_worker_places_it_and_before_it_is_told(bench, tmp_path):
    front, workers = front_of(bench, bench.store(tmp_path)), Workers()
    memory = asyncio.run(tell(front, workers, [5, 6, 7]))
    assert memory.report() == {
        "pool": {"id": "main@2", "tokens": 3, "chunks": 1, "note": memory.report()["pool"]["note"]}
    }
    assert workers.calls == ["write", "write_on", "write_on", "fetch", "place", "place", "place"]
    with Pools.open(tmp_path / "memory", writable=True) as pools:  # nobody else holds it
        assert (pools.rows("main@2")[:, -16:] == 0.5).all()


def test_a_write_that_the_disk_does_not_take_is_not_told(bench, tmp_path, monkeypatch):
    """Nothing is placed, the pool stays, and the next write goes."""
    front, workers = front_of(bench, bench.store(tmp_path)), Workers()

    def full(folder, *_: Any) -> str:
        raise not_written(folder, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(writing.records, "write_delta", full)
        memory = asyncio.run(tell(front, workers, [5, 6, 7]))
    assert memory.failure.status == 507 and "the pool is as it was" in str(memory.failure)
    assert memory.report() == {} and "place" not in workers.calls
    with Pools.open(tmp_path / "memory", writable=True) as pools:
        assert pools.exact("main").version == 1
    assert asyncio.run(tell(front, Workers(), [5, 6, 7])).version.id == "main@2"


@pytest.mark.parametrize(("broken", "value", "told"), [("write_on", 0.5, "cannot"), ("", float("nan"), "NaN")])
def test_a_write_that_fails_leaves_nothing_behind(bench, tmp_path, broken, value, told):
    """Neither in the workers, nor a pool that it has begun, nor the lock of the store."""
    front, workers = front_of(bench, bench.store(tmp_path)), Workers(broken, value)
    memory = asyncio.run(tell(front, workers, [5, 6, 7], mem_inject="draft", mem_fork="main"))
    assert told in str(memory.failure) and memory.report() == {}
    assert ("write_off", memory.id) in workers.told or not broken
    with Pools.open(tmp_path / "memory", writable=True) as pools:
        assert [info.name for info in pools.list()] == ["main"] and pools.exact("main").version == 1


def test_writes_that_come_at_once_go_one_after_the_other(bench, tmp_path):
    """Each has the rows before it as the one before has left them; pools of others do not wait."""
    front = front_of(bench, bench.store(tmp_path))
    with Pools.open(tmp_path / "memory", writable=True) as pools:
        pools.fork("other", "main")
    sides = [Workers(value=value) for value in (1.0, 2.0, 3.0)]

    async def scenario() -> list[Injecting]:
        texts = [(side, {"mem_inject": "other"} if i == 2 else {}) for i, side in enumerate(sides)]
        return list(await asyncio.gather(*(tell(front, side, [5 + i], **f) for i, (side, f) in enumerate(texts))))

    told = asyncio.run(scenario())
    assert [memory.version.id for memory in told] == ["main@2", "main@3", "other@2"]
    with Pools.open(tmp_path / "memory") as pools:
        last = pools.rows("main")[:, -32:]
        assert (last[:, 16:] == 2.0).all() and (last == 1.0).any(), "the first one's rows are below"
    tail = next(one[4] for one in sides[1].told if one[0] == "write")
    assert tail == to_bytes(torch.full((3, 16, 128), 1.0))


def test_stages_write_one_after_the_other_with_the_rows_of_the_one_before(bench, tmp_path):
    spans = ((0, 2), (2, 3))
    front, workers = front_of(bench, bench.store(tmp_path), engine(bench, pp_spans=spans)), Workers(spans=spans)
    assert asyncio.run(tell(front, workers, [5, 6])).version.id == "main@2"
    assert workers.calls == ["write", "write_on", "write", "fetch", "place", "place", "place"]
    with Pools.open(tmp_path / "memory") as pools:
        tail = pools.rows("main@1")[:, -16:]
    asked = [one[2:5] for one in workers.told if one[0] == "write"]
    assert asked == [(0, [5, 6], to_bytes(tail[:2])), (2, b"left", to_bytes(tail[2:]))]


@pytest.mark.parametrize("rows", [None, 4])
def test_a_pass_in_stages_gives_the_rows_of_one(rows):
    """Of a first write, too, whose rows have the embedding in them once more but for the model's last layer."""
    chance = torch.Generator().manual_seed(1)
    weights = WriteWeights(torch.randn(5, 1, 8, generator=chance), torch.randn(8, generator=chance))
    tail = None if rows is None else torch.randn(5, rows, 8, generator=chance)
    turns = torch.randn(5, 8, 8, generator=chance)
    layers = [lambda x, turn=turn: x + torch.tanh(x.cumsum(0) @ turn) for turn in turns]
    text, found = torch.randn(7, 8, generator=chance), []
    whole = write_pass(text, layers, weights, tail, 4)
    for first, end in ((0, 2), (2, 3), (3, 5)):
        part = WritePass(text, weights, None if tail is None else tail[first:end], 4, True, first)
        for layer in layers[first:end]:
            part.advance(layer)
        found.append(part.new(end == 5))
        text = part.hidden
    assert torch.equal(torch.cat(found), whole)


def test_a_text_that_begins_with_bos_is_refused_before_anybody_writes(bench, tmp_path):
    front, workers = front_of(bench, bench.store(tmp_path)), Workers()
    with pytest.raises(RequestError, match=rf"begins with BOS \({BOS}\)"):
        asyncio.run(tell(front, workers, [BOS, 5]))
    with pytest.raises(RequestError, match="at least one token"):
        asyncio.run(tell(front, workers, []))
    assert workers.told == []


def test_a_tenant_writes_its_own_pools_alone(bench, tmp_path):
    front = front_of(bench, bench.store(tmp_path))
    with pytest.raises(RequestError, match='mem_inject: pool "main" is unknown, or not yours'):
        asyncio.run(tell(front, Workers(), [5], tenant="acme"))
    memory = asyncio.run(tell(front, Workers(), [5], tenant="acme", mem_fork="main"))
    assert memory.version.id == "main@2" and front.pools.exact("main").version == 1


def kv_keys(front: PoolFrontEnd, tenant: str = "", **fields: Any) -> tuple[Any, ...]:
    """What the first block of a request's KV depends on."""
    memory = front.admit(parse(fields, tenant), RequestParams())
    asyncio.run(front.prepare(memory, [5, 6, 7], Workers()))
    return keys_between(RequestPayload({"memoryllm": front.payload(memory)}), 0, 16)


def test_fault29_pools_versions_owners_and_precisions_share_no_kv(bench, tmp_path):
    front = front_of(bench, bench.store(tmp_path))
    asyncio.run(tell(front, Workers(), [5]))
    with Pools.open(tmp_path / "memory", writable=True) as pools:
        pools.add("main", pools.rows("main@1"), tenant="acme")
        keys = [kv_keys(front, mem_pool="main@1"), kv_keys(front, mem_pool="main@2"), kv_keys(front, tenant="acme")]
        keys.append(
            kv_keys(front_of(bench, tmp_path / "memory", engine(bench, dtype=torch.bfloat16)), mem_pool="main@1")
        )
        assert kv_keys(front, mem_pool="main@1") == keys[0], "the same version keeps its keys"
        rows = pools.rows("main@1")
        pools.delete("main")
        pools.add("main", rows)
        keys.append(kv_keys(front, mem_pool="main@1"))
    assert len(set(keys)) == 5
