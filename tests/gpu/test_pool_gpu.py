"""The pool on a GPU: copies and steps keep out of each other's way, though steps run long after they were queued."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pool import PagePool
from tests.runtime.loading_case import DIM, HEADS, LAYERS, PAGE, SOON, Disk, placed, records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SIZES = {f"{name}@1": 2 * PAGE for name in "abcd"}
LONG = 200_000_000
"""Cycles that the GPU is busy with a step: about a tenth of a second."""


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.int8])
def pool(request) -> PagePool:
    return PagePool(LAYERS, HEADS, DIM, PAGE, 2, request.param, "cuda")


@pytest.fixture
def loader(pool):
    disk = Disk(dict(SIZES))
    loader = PageLoader(pool, lambda ref: nullcontext(placed(disk.load(ref))), host_bytes=8 * pool.layout.page_bytes)
    yield loader
    loader.close()


def load(loader: PageLoader, ref: str) -> None:
    """Fill both pages with an entry, and wait until they are."""
    assert loader.load(PageLoad(ref, [0, 1], SIZES[ref])).result(SOON) is None


def holds(pool: PagePool, ref: str) -> bool:
    return all(map(torch.equal, pool.read([0, 1]), records(pool.layout, ref, SIZES[ref])))


def test_pages_come_from_disk_and_host_bit_for_bit(pool, loader):
    for ref in ("a@1", "b@1", "a@1"):
        load(loader, ref)
        loader.before_step()
        assert holds(pool, ref)
    assert loader.stats()["hits.host"] == 1


def test_a_step_that_was_queued_before_the_load_reads_the_old_pages(pool, loader):
    load(loader, "a@1")
    loader.before_step()
    torch.cuda._sleep(LONG)
    read = pool._records.clone()  # the step: queued now, run later
    load(loader, "b@1")
    torch.cuda.current_stream().synchronize()
    assert torch.equal(read.cpu(), records(pool.layout, "a@1", SIZES["a@1"]).data)
    loader.before_step()
    assert holds(pool, "b@1")


def test_control_without_the_mark_the_step_reads_what_came_later(pool, loader, monkeypatch):
    monkeypatch.setattr(loader._fetcher.copies, "mark", lambda: None)
    load(loader, "b@1")  # the next load comes from the host cache
    load(loader, "a@1")
    loader.before_step()
    torch.cuda._sleep(LONG)
    read = pool._records.clone()
    load(loader, "b@1")
    torch.cuda.current_stream().synchronize()
    assert torch.equal(read.cpu(), records(pool.layout, "b@1", SIZES["b@1"]).data)


def test_before_step_waits_for_nothing_while_the_gpu_is_busy(pool, loader):
    load(loader, "a@1")
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    loader.before_step()
    assert not busy.query(), "it came back before the step that runs was over"
    torch.cuda.synchronize()


def test_the_pool_takes_the_memory_that_it_says():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    pool = PagePool(4, 8, 128, 16, 256, torch.int8, "cuda")
    assert pool.nbytes <= torch.cuda.memory_allocated() - before < pool.nbytes + 4096
