"""What engines share of MemoryLLM: versions on the device, refusals at start, rows on their way, a writer's guard."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from prometheus_client import REGISTRY

from mem_triton.schema import ConfigError
from mem_triton.store.pool.pages import PageLayout
from mem_triton.store.pool.pool import PagePool
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.layout import PoolLayout, layout_of, open_store
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.projections import Projections
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.residents import Residents
from mem_triton.systems.memoryllm.rows import from_bytes, to_bytes
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolShape, PoolVersion
from mem_triton.systems.memoryllm.update import UpdateStep, draw_dropped, updated
from mem_triton.systems.memoryllm.worker import PoolWorker
from mem_triton.systems.request import RequestError
from tests.support.host import host


def version(number: int, identity: str = "a" * 32) -> PoolVersion:
    return PoolVersion("", "main", identity, number)


def residents(versions: int, stride: int = 2) -> Residents:
    shape = PoolShape(layers=3, rows=80, hidden=16, tokens=16, dtype="float32")
    page = PageLayout(3, 2, 32, 64, torch.float32)
    return Residents(PoolLayout(81, 2, versions, page, 1), stride, shape)


class Workers:
    """What two workers are told; ``broken``: a call that one of them cannot carry out."""

    def __init__(self, broken: str = "") -> None:
        self.told: list[tuple] = []
        self.broken = broken

    async def __call__(self, call: str, *args):
        self.told.append((call, *args))
        return [{"error": None}, {"error": "cannot" if call == self.broken else None}]


def test_a_writer_waits_until_versions_are_released():
    """Not for other releases, nor for those of another pool."""
    kept = residents(4)
    versions = [PoolVersion("", "main", "a" * 32, number) for number in (1, 2)]
    other = PoolVersion("", "other", "b" * 32, 1)

    async def scenario() -> None:
        for owner, version in (("r1", versions[0]), ("r2", versions[0]), ("r3", versions[1]), ("r4", other)):
            kept.claim(owner, version)
        waiting = asyncio.create_task(kept.fewer_versions("a" * 32, 2))
        for owner in ("r4", "r1"):
            await asyncio.sleep(0)
            kept.release(owner)
            await asyncio.wait([waiting], timeout=0.01)
            assert not waiting.done(), "two versions are read still"
        kept.release("r2")
        await asyncio.wait_for(waiting, 10)
        await asyncio.wait_for(kept.fewer_versions("a" * 32, 2), 10)

    asyncio.run(scenario())


def test_c2_requests_on_one_version_share_its_pages_and_it_is_filled_once():
    async def scenario() -> None:
        kept, workers = residents(2), Workers()
        tickets = [kept.claim(f"r{i}", version(1)) for i in range(4)]
        await asyncio.gather(*(kept.wait(ticket, workers) for ticket in tickets))
        pages = [ticket.pages[version(1).ref] for ticket in tickets]
        assert pages == [pages[0]] * 4 and len(pages[0]) == 2
        ref, where = version(1).ref, list(pages[0])
        assert workers.told == [("fetch", ref), ("place", ref, where, 0, 2), ("place", ref, where, 2, 3)]

    asyncio.run(scenario())


def test_a_version_that_is_read_is_not_given_away_and_the_least_recent_one_makes_room():
    async def scenario() -> None:
        kept, workers = residents(2), Workers()
        one, two = kept.claim("a", version(1)), kept.claim("b", version(2))
        await kept.wait(one, workers)
        await kept.wait(two, workers)
        three = kept.claim("c", version(3))
        assert three.state == "waiting" and kept.versions("a" * 32) == 3
        kept.release("b")
        await kept.wait(three, workers)
        assert three.pages[version(3).ref] == two.pages[version(2).ref] != one.pages[version(1).ref]
        kept.release("a")
        kept.release("c")
        before = len(workers.told)
        again = kept.claim("d", version(3))
        await kept.wait(again, workers)
        assert len(workers.told) == before, "it is there still"

    asyncio.run(scenario())


def test_a_version_that_cannot_be_committed_takes_no_place():
    from mem_triton.store.pool.loads import MemoryLoadError

    async def scenario() -> None:
        kept, workers = residents(1), Workers()

        async def commit() -> str | None:
            return "the disk is full"

        ticket = kept.claim("writer", version(2), commit)
        with pytest.raises(MemoryLoadError, match="the disk is full"):
            await kept.wait(ticket, workers)
        kept.release("writer")
        assert workers.told == []
        again = kept.claim("reader", version(1))
        await kept.wait(again, workers)

    asyncio.run(scenario())


@pytest.mark.parametrize("broken", ["fetch", "place"])
def test_a_version_that_a_worker_cannot_fill_fails_who_waits_for_it_and_is_tried_again(broken):
    from mem_triton.store.pool.loads import MemoryLoadError

    async def scenario() -> None:
        kept, workers = residents(1), Workers(broken)
        ticket = kept.claim("a", version(1))
        with pytest.raises(MemoryLoadError, match="cannot"):
            await kept.wait(ticket, workers)
        kept.release("a")
        workers.broken = ""
        await kept.wait(kept.claim("b", version(1)), workers)

    asyncio.run(scenario())


def test_references_name_one_version_whatever_is_called_so():
    one = PoolVersion("acme", "a.b-c", "0" * 32, 7)
    assert PoolVersion.of(one.ref) == one and one.id == "a.b-c@7"
    others = [replace(one, tenant=""), replace(one, identity="1" * 32), replace(one, version=8), replace(one, name="x")]
    assert len({one.ref, *(other.ref for other in others)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_cross_processes_as_they_are(dtype):
    rows = torch.randn(3, 5, 8).to(dtype)
    assert torch.equal(from_bytes(to_bytes(rows), (3, -1, 8), dtype), rows)
    with pytest.raises(ValueError, match="are no rows"):
        from_bytes(to_bytes(rows)[:-1], (3, -1, 8), dtype)


def test_tokens_on_the_device_are_put_into_pages_as_packed_ones_are():
    from mem_triton.store.block import MemoryBlock

    pool = PagePool(2, 2, 32, 16, 6, torch.float32, "cpu")
    keys, values = torch.randn(2, 2, 2, 37, 32).unbind(0)
    pool.write([4, 0, 3], pool.pack(MemoryBlock(keys, values, torch.zeros(2, 2, 37, dtype=torch.int32))))
    for layer in range(2):
        pool.write_layer(layer, [1, 5, 2], keys[layer], values[layer])
    assert torch.equal(pool.read([1, 5, 2]).data, pool.read([4, 0, 3]).data)
    with pytest.raises(ValueError, match="2 pages for keys"):
        pool.write_layer(0, [1, 2], keys[0], values[0])


def test_a_write_that_another_one_overtook_is_not_committed(tmp_path):
    shape = PoolShape(layers=2, rows=8, hidden=4, tokens=2, dtype="float32")
    with Pools.create(tmp_path / "memory", shape, {}) as pools:
        pools.add("main", torch.randn(2, 8, 4))
        first, second = pools.begin("main"), pools.begin("main")
        for write in (first, second):
            write.apply(torch.randn(2, 2, 4))
        assert first.commit() == "main@2"
        with pytest.raises(PoolError, match="was written meanwhile"):
            second.commit()
        assert pools.exact("main").version == 2
        made = pools.exact("main@1")
        pools.delete("main")
        pools.add("main", torch.randn(2, 8, 4))
        with pytest.raises(PoolError, match="another one is called so now"):
            pools.state_of(made)


def test_a_pool_that_another_process_made_again_is_not_the_one_that_was_read(tmp_path):
    shape = PoolShape(layers=2, rows=8, hidden=4, tokens=2, dtype="float32")
    with Pools.create(tmp_path / "memory", shape, {}) as pools:
        pools.add("main", torch.zeros(2, 8, 4))
        reader = Pools.open(tmp_path / "memory")
        assert not reader.rows("main").any()
        pools.delete("main")
        pools.add("main", torch.ones(2, 8, 4))
        assert reader.rows("main").all()


def test_a_reader_follows_a_writer_by_what_changed(tmp_path):
    """It reads one delta, and not all since the last snapshot; the rows are those of a reader that begins anew."""
    shape = PoolShape(layers=2, rows=8, hidden=4, tokens=2, dtype="float32", per_layer=True)
    with Pools.create(tmp_path / "memory", shape, {}) as pools:
        pools.add("main", torch.randn(2, 8, 4))
        reader = Pools.open(tmp_path / "memory")
        for _ in range(3):
            reader.rows("main")
            with pools.writing("main") as write:
                write.apply(torch.randn(2, 2, 4))
                write.commit()
        folder = tmp_path / "memory" / "pools" / "main"
        reader.rows("main@3")
        (folder / "0000000002.delta.safetensors").rename(tmp_path / "away")
        assert torch.equal(reader.rows("main@4"), pools.rows("main"))
        with pytest.raises(PoolError):
            Pools.open(tmp_path / "memory").rows("main@4")


@pytest.fixture(scope="module")
def pool_bench(tmp_path_factory):
    from tests.support.pool_bench import make_pool_bench

    return make_pool_bench(tmp_path_factory.mktemp("pools"))


def engine(pool_bench, **more) -> EngineShape:
    plain = {
        "engine": "vLLM",
        "model": str(pool_bench.model),
        "revision": None,
        "hf_config": pool_bench.oracle.config.to_dict(),
        "dtype": torch.float32,
        "hidden": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "tp_size": 1,
        "pp_spans": ((0, 3),),
        "max_requests": 4,
        "max_step_tokens": 64,
        "max_model_len": 512,
    }
    return EngineShape(**{**plain, **more})


def test_what_cannot_be_served_is_refused_at_start_with_the_key_and_the_number(pool_bench, tmp_path):
    store = pool_bench.store(tmp_path)
    section = MemoryLLMSection(pools=store)
    pools = open_store(engine(pool_bench), section)
    assert layout_of(engine(pool_bench), section, pools.shape).versions == 64 * 3, "no more than can be used"
    assert layout_of(engine(pool_bench), section.model_copy(update={"gib": 0.0004}), pools.shape).versions == 2
    with pytest.raises(ConfigError, match=r"memoryllm.gib: 1e-05 holds no version of a pool, which takes 0.000 GiB"):
        layout_of(engine(pool_bench), section.model_copy(update={"gib": 1e-5}), pools.shape)
    with pytest.raises(ConfigError, match=r"memoryllm.pools: the engine quantises the weights \(fp8\)"):
        open_store(engine(pool_bench, quantization="fp8"), section)
    turned = {**pool_bench.oracle.config.to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(ConfigError, match=r"memoryllm.pools: .* was made for another model \(RoPE"):
        open_store(engine(pool_bench, hf_config=turned), section)
    with pytest.raises(ConfigError, match=r"memoryllm.pools: .*is no store of pools"):
        open_store(engine(pool_bench), section.model_copy(update={"pools": tmp_path}))


def test_the_front_end_says_at_start_that_its_default_is_unknown(pool_bench, tmp_path):
    from mem_triton.systems.base import FrontendServices
    from mem_triton.systems.memoryllm.frontend import PoolFrontEnd

    section = MemoryLLMSection(pools=pool_bench.store(tmp_path), default="nobody")
    with pytest.raises(ConfigError, match=r'memoryllm\.default: pool "nobody" is unknown'):
        PoolFrontEnd(engine(pool_bench), section, FrontendServices())


def test_fault10_a_running_server_serves_on_without_a_default_pool_that_was_deleted(pool_bench, tmp_path, caplog):
    from mem_triton.systems.base import FrontendServices
    from mem_triton.systems.memoryllm.frontend import PoolFrontEnd
    from mem_triton.systems.memoryllm.request import parse
    from mem_triton.systems.params import RequestParams

    store = pool_bench.store(tmp_path)
    front = PoolFrontEnd(engine(pool_bench), MemoryLLMSection(pools=store), FrontendServices())
    assert front.admit(parse({}), RequestParams()).version.id == "main@1"
    before = REGISTRY.get_sample_value("mem_triton:defaults_lost_total")
    with Pools.open(store, writable=True) as pools:
        pools.delete("main")
    for _ in range(2):
        assert front.admit(parse({}), RequestParams()) is None
    assert REGISTRY.get_sample_value("mem_triton:defaults_lost_total") == before + 1
    assert caplog.text.count("served without a pool") == 1
    with pytest.raises(RequestError, match=r"mem_pool: .*unknown"):
        front.admit(parse({"mem_pool": "main"}), RequestParams())
    with Pools.open(store, writable=True) as pools:
        pools.add("main", torch.zeros(pools.shape.layers, pools.shape.rows, pools.shape.hidden))
    assert front.admit(parse({}), RequestParams()).version.id == "main@1", "one that is made again is read"


def admit(pool_bench, store, fields, **said):
    from mem_triton.systems.base import Capability, FrontendServices
    from mem_triton.systems.memoryllm.frontend import PoolFrontEnd
    from mem_triton.systems.memoryllm.request import parse
    from mem_triton.systems.params import RequestParams

    shape = engine(pool_bench, **said.pop("shape", {}))
    obstacles = {Capability.SEGMENTS: "not here"} if said.pop("obstacle", False) else {}
    section = MemoryLLMSection(pools=store, **said.pop("section", {}))
    front = PoolFrontEnd(shape, section, FrontendServices(obstacles=obstacles))
    return front.admit(parse(fields), RequestParams(**said))


@pytest.mark.parametrize(
    ("fields", "said", "message"),
    [
        (
            {},
            {"lora": "l:1"},
            'mem_pool: a LoRA adapter computes other keys.*; with mem_pool "" the request reads none',
        ),
        ({}, {"unfit": "streaming inputs"}, "mem_pool: streaming inputs cannot read a pool"),
        ({}, {"obstacle": True}, "mem_pool: not here"),
        ({"mem_inject": "main"}, {"obstacle": True}, "mem_inject: not here"),
        ({"mem_inject": "main"}, {"lora": "l:1"}, "mem_inject: does not go together with a LoRA adapter"),
        ({"mem_inject": "main"}, {"unfit": "prompts given as embeddings"}, "mem_inject: .*prompts given as embeddings"),
        ({"mem_inject": "main"}, {"answers": 2}, "mem_inject: .*n: a write has one answer"),
        ({"mem_inject": "main"}, {"stops": True}, "mem_inject: .*stop strings"),
    ],
)
def test_what_a_request_cannot_have_is_refused_by_name(pool_bench, tmp_path, fields, said, message):
    with pytest.raises(RequestError, match=message):
        admit(pool_bench, pool_bench.store(tmp_path), fields, **said)


def test_requests_read_the_default_none_or_what_they_name(pool_bench, tmp_path):
    store = pool_bench.store(tmp_path)
    with Pools.open(store, writable=True) as pools:
        pools.add("empty")
    assert admit(pool_bench, store, {}).version.id == "main@1"
    assert admit(pool_bench, store, {"mem_pool": "main"}, lora="").version.id == "main@1"
    assert admit(pool_bench, store, {"mem_pool": ""}, lora="l:1") is None
    assert admit(pool_bench, store, {}, section={"default": None}) is None
    assert admit(pool_bench, store, {}, section={"default": "empty"}) is None, "until something is written"
    with pytest.raises(RequestError, match='mem_pool: pool "empty" has no rows yet'):
        admit(pool_bench, store, {"mem_pool": "empty"})


class HostLayers:
    """The layers of a model of transformers, as an engine gives its own."""

    def __init__(self, model) -> None:
        self.layers = model.get_decoder().layers
        self.projected = 0

    def project(self, layer, rows, adapter):
        assert not adapter
        attention, given = self.layers[layer].self_attn, self.layers[layer].input_layernorm(rows)
        self.projected += len(rows)
        keys, values = attention.k_proj(given), attention.v_proj(given)
        return tuple(x.view(len(rows), -1, attention.head_dim).transpose(0, 1) for x in (keys, values))


@pytest.mark.parametrize("updates", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_c4_a_version_that_follows_another_is_to_the_bit_what_its_rows_give(pool_bench, updates, per_layer):
    """Survivors keep what they had, however often rows are written; only new rows are projected."""
    io, chance = HostLayers(pool_bench.oracle), torch.Generator().manual_seed(3)
    bos, rows = torch.randn(3, 1, 128, generator=chance), torch.randn(3, 80, 128, generator=chance)
    projections = Projections(io, bos, 16, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        made = [projections.whole(layer, rows[layer]) for layer in range(3)]
        io.projected = 0
        for _ in range(updates):
            count = 16 if torch.rand(1, generator=chance) < 0.8 else 5
            step = UpdateStep(
                torch.randn(3, count, 128, generator=chance), draw_dropped(80, count, 3 if per_layer else 1, chance)
            )
            rows = updated(rows, step, 80)
            made = [projections.after(layer, made[layer], [step]) for layer in range(3)]
        assert io.projected == updates * 3 * 16
        for layer in range(3):
            keys, values = projections.whole(layer, rows[layer])
            assert torch.equal(made[layer][0], keys) and torch.equal(made[layer][1], values)


def test_workers_make_a_version_of_the_one_before_and_of_its_rows_alike(pool_bench, tmp_path):
    """What lies in the pages is the same to the bit, after a compaction, too, which takes the deltas away."""
    store = pool_bench.store(tmp_path)
    section = MemoryLLMSection(pools=store, gib=0.002)
    io = HostLayers(pool_bench.oracle)
    follower, fresh = (PoolWorker(engine(pool_bench), section, host(range(3), layer_io=lambda: io)) for _ in range(2))
    with Pools.open(store, writable=True) as pools:
        for number in range(1, 5):
            if number > 1:
                with pools.writing("main", seed=number) as write:
                    write.apply(torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(number)))
                    write.commit()
            if number == 4:
                pools.compact("main")
            ref, pages = pools.exact("main").ref, [2 * number, 2 * number + 1]
            for worker in (follower, fresh):
                assert worker.fetch(ref) == {"error": None}
                follows = worker is follower and 1 < number < 4
                assert (worker._sources[ref].before is not None) == follows
                for first, end in ((0, 2), (2, 3)):
                    assert worker.place(ref, pages, first, end) == {"error": None}
            fresh.tier.clear()
            assert torch.equal(follower.pool.read(pages).data, fresh.pool.read(pages).data)
    assert "is unknown" in follower.fetch(":nobody:0@1")["error"]


def test_what_fails_beside_an_answer_has_its_status():
    from mem_triton.store.errors import BankFullError, BankLockedError
    from mem_triton.systems.memoryllm.injections import _status

    assert [_status(error("x")) for error in (BankFullError, BankLockedError, PoolError)] == [507, 503, 500]
