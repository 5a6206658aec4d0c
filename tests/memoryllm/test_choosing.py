"""M+'s long-term rows in a worker without an engine: what lies in the tiers, and who chooses when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mem_triton.schema import ConfigError
from mem_triton.systems.base import StepBatch
from mem_triton.systems.memoryllm.layout import layout_of, open_store
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.residents import Residents
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolVersion, picks_ref
from mem_triton.systems.memoryllm.worker import PoolWorker
from mem_triton.systems.payload import PageRun, Segment, SystemPayload
from mem_triton.systems.request import RequestError
from tests.memoryllm import test_serving
from tests.support.host import host
from tests.support.pool_bench import LAYERS, PROMPTS, PoolBench, make_pool_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("mplus"), mplus=True)


class WatchedLayers(test_serving.HostLayers):
    """And what watches them."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.watching = {}

    def normed(self, layer, rows):
        return self.layers[layer].input_layernorm(rows)

    def watch(self, layer, seen):
        self.watching[layer] = seen

    def step(self, rows: int, seed: int = 0) -> None:
        """A forward pass of random rows."""
        for layer, seen in self.watching.items():
            seen(torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed + layer)))


def worker_of(bench: PoolBench, store, lost: list | None = None, **ltm) -> tuple[PoolWorker, WatchedLayers]:
    section, io = MemoryLLMSection(pools=store, gib=0.01, ltm=ltm), WatchedLayers(bench.oracle)
    lose = (lambda error, everybody: None) if lost is None else (lambda error, everybody: lost.append(error))
    return PoolWorker(test_serving.engine(bench), section, host(range(LAYERS), layer_io=lambda: io, lose=lose)), io


def place(worker: PoolWorker, ref: str, pages: list[int]) -> None:
    assert worker.fetch(ref) == {"error": None}
    for first, end in ((0, 2), (2, LAYERS)):
        assert worker.place(ref, pages, first, end) == {"error": None}


def payload(ref: str, pages: list[int], own: int, owner: str, prompt: int) -> SystemPayload:
    runs = {ref: PageRun(tuple(pages), 49), picks_ref(owner): PageRun((own,), 32)}
    return SystemPayload("k", segments=tuple(map(Segment, runs)), pages=runs, prompt=prompt)


@pytest.mark.parametrize("ltm", [{}, {"device_keys": False, "tier": "device"}])
def test_c9_a_version_that_follows_has_to_the_bit_the_long_term_rows_of_a_fresh_one(bench, tmp_path, ltm):
    """What a pool drops goes to the tiers as it was projected, over merges."""
    store = bench.store(tmp_path)
    (follower, _), (fresh, _) = (worker_of(bench, store, **ltm) for _ in range(2))
    with Pools.open(store, writable=True) as pools:
        for number in range(1, 9):
            if number > 1:
                chance = torch.Generator().manual_seed(number)
                with pools.writing("main", seed=number) as write:
                    rows, keys = (torch.randn(3, 16, n, generator=chance) for n in (128, 12))
                    write.apply(rows, 20, keys)
                    write.commit()
            ref = pools.exact("main").ref
            for worker in (follower, fresh):
                place(worker, ref, [number])
            fresh.tier.clear()
            one, other = follower._long[ref], fresh._long[ref]
            stored = pools.state("main").long_term
            for layer in range(LAYERS):
                assert one.count(layer) == other.count(layer) == stored.count(layer)
                assert torch.equal(one.ages_of(layer), stored.ages_of(layer))
                for mine, theirs in zip(one.rows(layer), other.rows(layer), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(mine.content, theirs.content, strict=True))
                    assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.frequencies, theirs.frequencies)
    assert set(follower._long) <= set(follower._held.values()), "and nothing stays of what is not on the device"


def test_a_prompt_chooses_once_and_what_it_chose_stays_when_it_is_preempted(bench, tmp_path):
    worker, io = worker_of(bench, bench.store(tmp_path))
    with Pools.open(tmp_path / "memory") as pools:
        ref = pools.exact("main").ref
    place(worker, ref, [0])
    worker.enter("a", payload(ref, [0], 5, "a", 7))
    worker.enter("b", payload(ref, [0], 6, "b", 4))
    assert worker.begin_step(StepBatch(["x", "b", "a"], [9, 0, 0], [9, 3, 6])) == {}
    io.step(12)
    first, other = worker.pool.read([5]).data, worker.pool.read([6]).data
    assert first.any() and other.any() and not torch.equal(first, other)
    worker.begin_step(StepBatch(["b", "a"], [4, 7], [4, 7]))
    io.step(2, seed=9)
    worker.leave("a")
    worker.enter("a", payload(ref, [0], 5, "a", 7))
    assert worker.begin_step(StepBatch(["a"], [0], [9])) == {}, "its prompt and what it has answered run again"
    io.step(10, seed=17)
    assert torch.equal(worker.pool.read([5]).data, first) and torch.equal(worker.pool.read([6]).data, other)
    worker.leave("a")
    worker.enter("c", payload(ref, [0], 5, "c", 4))  # the page has another owner
    worker.begin_step(StepBatch(["c"], [0], [3]))
    io.step(4, seed=3)
    assert not torch.equal(third := worker.pool.read([5]).data, first)
    worker.leave("c")
    worker.enter("a", payload(ref, [0], 5, "a", 7))
    worker.begin_step(StepBatch(["a"], [0], [9]))
    io.step(10, seed=17)
    assert not torch.equal(worker.pool.read([5]).data, third), "what another has chosen there is not its own"


def test_prompts_that_are_split_or_not_seen_lose_their_memory_and_say_so(bench, tmp_path):
    lost: list[Exception] = []
    worker, io = worker_of(bench, bench.store(tmp_path), lost)
    with Pools.open(tmp_path / "memory") as pools:
        ref = pools.exact("main").ref
    place(worker, ref, [0])
    worker.enter("a", payload(ref, [0], 5, "a", 70))
    faults = worker.begin_step(StepBatch(["a"], [0], [63]))
    assert "chooses long-term rows as a whole, and the step has those from 0 to 63" in str(faults["a"])
    worker.drop_request("a")
    worker.enter("b", payload(ref, [0], 6, "b", 4))
    assert worker.begin_step(StepBatch(["b"], [0], [3])) == {}
    faults = worker.begin_step(StepBatch(["b"], [4], [4]))  # no layer has run
    assert "not all layers have chosen" in str(faults["b"])
    worker.drop_request("b")
    worker.enter("c", payload(ref, [0], 7, "c", 4))
    worker.begin_step(StepBatch(["c"], [0], [3]))
    for seen in io.watching.values():
        seen(torch.randn(4, 3))  # rows that are none
    assert len(lost) == LAYERS and "c" in worker
    with pytest.raises(RuntimeError, match=r"the pages of another@1 hold something else by now"):
        worker.enter("d", payload("another@1", [0], 5, "d", 4))
    assert "d" not in worker


def test_parts_of_a_prompt_choose_for_themselves_where_that_is_configured(bench, tmp_path):
    worker, io = worker_of(bench, bench.store(tmp_path), selection="chunk")
    with Pools.open(tmp_path / "memory") as pools:
        ref = pools.exact("main").ref
    place(worker, ref, [0])
    worker.enter("a", payload(ref, [0], 5, "a", 70))
    pages = []
    for seed, (first, last) in enumerate(((0, 63), (64, 69), (70, 70))):
        assert worker.begin_step(StepBatch(["a"], [first], [last])) == {}
        io.step(last - first + 1, seed=10 * seed)
        pages.append(worker.pool.read([5]).data)
    assert not torch.equal(pages[0], pages[1]) and torch.equal(pages[1], pages[2])


def test_pages_of_picks_are_claimed_with_a_version_and_free_when_their_request_ends(bench, tmp_path):
    section = MemoryLLMSection(pools=bench.store(tmp_path), gib=0.01)
    shape = open_store(test_serving.engine(bench), section).shape
    layout = layout_of(test_serving.engine(bench), section, shape)
    assert (layout.pages, layout.picks, layout.requests) == (1, 1, 4) and "at once" in layout.describe()
    layout = replace(layout, versions=1, requests=2)
    kept, one = Residents(layout, 3, shape), PoolVersion("", "main", "a" * 32, 1)
    tickets = [kept.claim(f"r{i}", one, reads=True) for i in range(3)]
    assert [ticket.state for ticket in tickets] == ["loading", "loading", "waiting"]
    used = [ticket.pages[picks_ref(f"r{i}")] for i, ticket in enumerate(tickets[:2])]
    assert used[0] != used[1] and kept.claim("writer", one).pages.keys() == {one.ref}
    kept._residency.loaded(one.ref), kept._residency.loaded(picks_ref("r0"))
    kept.release("r0")
    assert tickets[2].pages[picks_ref("r2")] == used[0] and tickets[2].state == "loading"


def test_what_cannot_be_served_is_refused_by_name(bench, tmp_path):
    section = MemoryLLMSection(pools=bench.store(tmp_path), gib=0.01)
    splits = test_serving.engine(bench, splits_prompts="--no-enable-chunked-prefill")
    with pytest.raises(ConfigError, match=r"ltm\.selection: .*start it with --no-enable-chunked-prefill, or let"):
        open_store(splits, section)
    assert open_store(splits, MemoryLLMSection(pools=section.pools, gib=0.01, ltm={"selection": "chunk"}))
    shape = open_store(test_serving.engine(bench), section).shape
    with pytest.raises(ConfigError, match=r"gib: 1e-05 holds no version"):
        layout_of(test_serving.engine(bench), section.model_copy(update={"gib": 1e-5}), shape)
    from mem_triton.systems.base import FrontendServices
    from mem_triton.systems.memoryllm.frontend import PoolFrontEnd

    part = PoolFrontEnd(test_serving.engine(bench), section, FrontendServices())
    with pytest.raises(RequestError, match="mem_pool: the prompt has 150 tokens, and max_num_batched_tokens is 64"):
        part._checked(len(PROMPTS[2]))
    assert part._checked(64) == 64
