"""Pages hold what was written, where it was written, and the loader fills them behind the engine's back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pool import PagePool

L, H, D, P = 2, 3, 16, 4
CPU = torch.device("cpu")


def block(tokens: int, seed: int = 0) -> MemoryBlock:
    keys, values = torch.randn(2, L, H, tokens, D, generator=torch.Generator().manual_seed(seed))
    return MemoryBlock(keys, values, torch.arange(tokens, dtype=torch.int32).expand(L, H, tokens))


def pool(pages: int = 6, dtype: torch.dtype = torch.float32) -> PagePool:
    return PagePool(L, H, D, P, pages, dtype, CPU)


def read(p: PagePool, pages: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, H, tokens, D] out of the pool's layers, scales applied."""
    both = []
    for layer in (p.layer(i) for i in range(L)):
        keys, values = layer.keys[pages].float(), layer.values[pages].float()
        if layer.key_scale is not None:
            keys, values = keys * layer.key_scale[pages][:, :, None], values * layer.value_scale[pages][..., None]
        both.append([x.transpose(0, 1).flatten(1, 2)[:, :tokens] for x in (keys, values)])
    return tuple(torch.stack(x) for x in zip(*both, strict=True))


@pytest.mark.parametrize("tokens", [1, 4, 5, 11])
def test_a_block_comes_back_bit_for_bit_and_touches_no_other_page(tokens):
    p, b = pool(), block(tokens)
    pages = [5, 0, 3][: -(-tokens // P)]
    before = p._data.fill_(7).clone()
    p.write(pages, p.pack(b))
    keys, values = read(p, pages, tokens)
    assert torch.equal(keys, b.keys) and torch.equal(values, b.values)
    others = [i for i in range(6) if i not in pages]
    assert torch.equal(p._data[:, others], before[:, others])


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04), (torch.bfloat16, 0.004)])
def test_smaller_pages_lose_little_and_say_so_in_their_size(dtype, error):
    p, b = pool(dtype=dtype), block(11)
    p.write([1, 2, 4], p.pack(b))
    for got, true in zip(read(p, [1, 2, 4], 11), (b.keys, b.values), strict=True):
        assert ((got - true).norm() / true.norm()).item() < error
    shape = {"num_layers": L, "kv_heads": H, "head_dim": D, "page_tokens": P, "dtype": dtype}
    assert p.nbytes == PagePool.bytes_for(6, **shape)
    assert PagePool.pages_for_bytes(p.nbytes, **shape) == 6 and PagePool.pages_for_bytes(p.nbytes - 1, **shape) == 5


def test_a_slow_load_holds_nobody_up_and_an_error_is_an_answer():
    p, go, blocks = pool(), threading.Event(), {"slow@1": block(4, 1), "quick@1": block(4, 2)}

    @contextmanager
    def source(ref: str) -> Iterator[MemoryBlock]:
        if ref == "bad@1":
            raise OSError("disk on fire")
        if ref == "slow@1":
            assert go.wait(20)
        yield blocks[ref]

    loader = PageLoader(p, source, host_bytes=1 << 20)
    over = {ref: loader.load(PageLoad(ref, [page], 4)) for page, ref in enumerate(("slow@1", "quick@1", "bad@1"))}
    assert over["quick@1"].result(20) is None and over["bad@1"].result(20) == "OSError: disk on fire"
    again = loader.load(PageLoad("slow@1", [0], 4))  # an order that is under way changes nothing
    assert torch.equal(read(p, [1], 4)[0], blocks["quick@1"].keys) and not read(p, [0], 4)[0].any()
    go.set()
    assert over["slow@1"].result(20) is again.result(20) is None and loader.stats()["misses.host"] == 3
    assert torch.equal(read(p, [0], 4)[0], blocks["slow@1"].keys)
    loader.close()


def test_the_host_keeps_what_left_the_device_until_its_bytes_are_spent():
    reads: list[str] = []
    p = pool()

    @contextmanager
    def source(ref: str) -> Iterator[MemoryBlock]:
        reads.append(ref)
        yield block(4, int(ref[0]))

    loader = PageLoader(p, source, host_bytes=2 * p.pack(block(4)).nbytes, workers=1)
    for ref in ("1@1", "2@1", "1@1", "3@1", "1@1", "2@1"):  # the third pushes 2 out, which was used longest ago
        assert loader.load(PageLoad(ref, [int(ref[0])], 4)).result(20) is None
    assert reads == ["1@1", "2@1", "3@1", "2@1"]
    assert torch.equal(read(p, [1], 4)[0], block(4, 1).keys)
    loader.close()
