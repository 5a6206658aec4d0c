"""A worker's host keeps what its device has no room for."""

from __future__ import annotations

import torch

from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.worker import PoolWorker
from tests.memoryllm.test_serving import HostLayers, engine, pool_bench
from tests.support.host import host

__all__ = ["pool_bench"]


def test_what_left_the_device_comes_back_from_the_host_without_the_model(pool_bench, tmp_path):
    """To the bit; the least recently read pools leave the host, too, and one always stays."""
    store, names = pool_bench.store(tmp_path), ["main", "b", "c"]
    with Pools.open(store, writable=True) as pools:
        for name in names[1:]:
            pools.add(name, torch.randn(3, 80, 128))
        refs = {name: pools.exact(name).ref for name in names}
        io, one = HostLayers(pool_bench.oracle), 2 * 3 * 2 * 81 * 32 * 4
        for room, stay in ((4 * one, 3), (2 * one, 2), (0, 1)):
            section = MemoryLLMSection(pools=store, gib=0.002, host_gib=room / 2**30)
            worker = PoolWorker(engine(pool_bench), section, host(range(3), layer_io=lambda: io))
            first = {}
            for name in [*names, "main"]:  # all share their pages, as with room for one version
                assert worker.fetch(refs[name]) == worker.place(refs[name], [0, 1], 0, 3) == {"error": None}
                again = worker.pool.read([0, 1]).data.clone()
                assert torch.equal(first.setdefault(name, again), again)
            assert len(worker.tier) == stay
            io.projected = 0
            assert worker.fetch(refs["main"]) == worker.place(refs["main"], [2, 3], 0, 3) == {"error": None}
            assert io.projected == 0 and torch.equal(worker.pool.read([2, 3]).data, first["main"])
            for name in ("b", "c"):
                assert worker.fetch(refs[name]) == worker.place(refs[name], [0, 1], 0, 3) == {"error": None}
                assert torch.equal(worker.pool.read([0, 1]).data, first[name])
            assert (io.projected == 0) == (stay == 3), "with less room they are made anew"
