"""The pool's memory: what a page costs, where its parts lie, and that attention reads from it what was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.memory_attention import (
    FOREVER,
    AttentionCall,
    MemoryPages,
    MemoryTable,
    PagedContext,
    memory_attention,
)
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.pages import PageLayout
from mem_triton.store.pool.pool import PagePool

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SHAPE = {"num_layers": 3, "kv_heads": 2, "head_dim": 16, "page_tokens": 4}


def pool(pages: int = 8, dtype: torch.dtype = torch.float32, **shape: int) -> PagePool:
    return PagePool(**(SHAPE | shape), num_pages=pages, dtype=dtype, device="cpu")


def block(
    tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3, size: int = 16
) -> MemoryBlock:
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, layers, 2, tokens, size, generator=g).to(dtype)
    return MemoryBlock(keys, values, torch.arange(tokens, dtype=torch.int32).expand(layers, 2, tokens))


def taken(p: PagePool) -> int:
    """Bytes of all tensors that the pool holds."""
    tensors = [v for v in vars(p).values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "page"), [(1, 32, 16), (8, 80, 8), (2, 96, 5), (3, 7, 1)])
def test_a_size_in_bytes_becomes_pages_and_the_pool_takes_just_that(dtype, heads, size, page):
    shape = {"num_layers": 3, "kv_heads": heads, "head_dim": size, "page_tokens": page, "dtype": dtype}
    budget = 1 << 20
    pages = PagePool.pages_for_bytes(budget, **shape)
    p = PagePool(**shape, num_pages=pages, device="cpu")
    assert taken(p) == p.nbytes == PagePool.bytes_for(pages, **shape) <= budget
    assert PagePool.bytes_for(pages + 1, **shape) > budget


def test_8_bits_hold_almost_twice_or_four_times_as_much():
    shape = {"num_layers": 18, "kv_heads": 8, "head_dim": 128, "page_tokens": 16}
    fp32, bf16, int8 = (PagePool.pages_for_bytes(1 << 30, **shape, dtype=d) for d in (DTYPES[0], DTYPES[2], DTYPES[3]))
    assert bf16 == 2 * fp32 and 1.7 * bf16 < int8 < 2 * bf16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 256])
def test_every_token_can_be_loaded_in_vectors(dtype, size):
    layer = pool(5, dtype, head_dim=size, page_tokens=8).layer(1)
    for tensor in (layer.keys, layer.values):
        assert tensor.data_ptr() % 16 == 0 and all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])
    assert layer.keys.stride() == layer.values.stride() and layer.keys.stride(-1) == 1
    if layer.key_scale is not None:
        assert layer.key_scale.is_contiguous() and layer.value_scale.is_contiguous(), "as kernels read them"


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("tokens", [1, 4, 5, 12])
def test_b8_what_is_stored_in_the_models_dtype_is_read_bit_for_bit(dtype, tokens):
    p, b = pool(dtype=dtype), block(tokens, dtype=dtype)
    pages = [6, 2, 3][: -(-tokens // 4)]
    p.write(pages, p.pack(b))
    for index in range(3):
        layer = p.layer(index)
        for stored, true in ((layer.keys, b.keys[index]), (layer.values, b.values[index])):
            assert torch.equal(stored[pages].transpose(0, 1).flatten(1, 2)[:, :tokens], true)
            assert not stored[pages].transpose(0, 1).flatten(1, 2)[:, tokens:].any(), "unused tokens are zero"


@pytest.mark.parametrize(("dtype", "step"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_b8_8_bits_are_off_by_half_a_step_of_their_scale_at_most(dtype, step):
    """int8: half of 1/127 of the channel's largest key or the token's largest value; fp8 has three bits of mantissa."""
    p, b = pool(dtype=dtype), block(11, seed=3)
    p.write([5, 0, 7], p.pack(b))
    keys, values = p.layout.unpack(p.read([5, 0, 7]), 11)
    for page in range(3):
        part = slice(4 * page, 4 * page + 4)
        for got, true, dim in ((keys, b.keys, 2), (values, b.values, 3)):
            got, true = got[:, :, part], true[:, :, part]
            largest = true.abs().amax(dim, keepdim=True)
            bound = largest * step if dtype == torch.int8 else true.abs() * step + largest * 2.0**-15
            assert ((got - true).abs() <= bound * (1 + 1e-5)).all()


def context(rows: int, tokens: int, heads: int, size: int) -> PagedContext:
    keys, values = torch.randn(2, rows + 1, heads, 16, size, generator=torch.Generator().manual_seed(9))
    block_table = torch.arange(1, rows + 1, dtype=torch.int32)[:, None]
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return PagedContext(keys, values, block_table, starts, torch.full((rows,), tokens, dtype=torch.int32), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_from_the_pool_what_was_written(dtype):
    """Against the same call on plain, contiguous tensors; every other page of the pool is poisoned."""
    p = pool(dtype=dtype)
    p._records.fill_(0xFF)  # NaN in every float dtype
    runs = {0: ([6, 2], 7), 1: ([1], 3)}
    for slot, (pages, tokens) in runs.items():
        p.write(pages, p.pack(block(tokens, seed=slot)))
    table = MemoryTable(
        page=torch.tensor([[6, 2], [1, 0]], dtype=torch.int32),
        tokens=torch.tensor([[4, 3], [3, 0]], dtype=torch.int32),
        first=torch.zeros(2, 2, dtype=torch.int32),
        end=torch.full((2, 2), FOREVER, dtype=torch.int32),
        count=torch.tensor([2, 1], dtype=torch.int32),
    )
    query = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(4))
    row_slot = torch.tensor([1, -1, 0], dtype=torch.int32)
    for index in range(3):
        layer, outs = p.layer(index), []
        plain = MemoryPages(*(None if x is None else x.contiguous() for x in layer))
        for pages in (layer, plain):
            out = torch.full_like(query, float("nan"))
            memory_attention(AttentionCall(query, context(3, 5, 2, 16), out, 0.25, row_slot, pages, table))
            outs.append(out)
        assert torch.equal(*outs) and not outs[0].isnan().any()
        alone = torch.full_like(query, float("nan"))
        memory_attention(AttentionCall(query, context(3, 5, 2, 16), alone, 0.25))
        same = (outs[0] == alone).flatten(1).all(1).tolist()
        assert same == [False, True, False], "memory counts, for the rows that have it"


@given(
    order=st.permutations(range(8)),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_pages_in_any_order_hold_what_was_written_and_others_stay(order, sizes, dtype):
    p, left = pool(dtype=dtype), list(order)
    p._records.fill_(7)
    before, written = p.read(range(8)), {}
    for i, count in enumerate(sizes):
        pages, left = left[:count], left[count:]
        if len(pages) == count:
            written[tuple(pages)] = p.pack(block(4 * count - i, seed=i))
            p.write(pages, written[tuple(pages)])
    for pages, packed in written.items():
        now = p.read(pages)
        assert torch.equal(now.data, packed.data) and torch.equal(now.scales, packed.scales)
    others = [page for page in range(8) if not any(page in pages for pages in written)]
    now = p.read(range(8))
    assert torch.equal(now.data[others], before.data[others]) and torch.equal(now.scales[others], before.scales[others])


def test_neighbouring_pages_are_one_copy(monkeypatch):
    p, copies = pool(), []
    packed = p.pack(block(24))
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: (copies.append(len(self)), copy(self, *a, **k))[1])
    p.write([2, 3, 4, 7, 0, 1], packed)
    assert copies == [3, 1, 2]
    copies.clear()
    p.write([2, 3, 4], packed, rows=[1, 2, 5])
    assert copies == [2, 1], "rows must be neighbours, too"


def test_equal_blocks_are_equal_records_whatever_lay_in_memory():
    layout = PageLayout(3, 2, 7, 3, torch.int8)  # 252 bytes of data a page, 4 unused
    blocks = block(5, size=7)
    outs = [layout.empty(2) for _ in range(2)]
    for fill, out in zip((0, 255), outs, strict=True):
        out.data.fill_(fill), out.scales.fill_(fill)
        layout.pack(blocks, out)
    assert layout.data_bytes == 256
    assert torch.equal(outs[0].data, outs[1].data) and torch.equal(outs[0].scales, outs[1].scales)


@pytest.mark.parametrize(
    ("pages", "rows", "tokens", "named"),
    [
        ([0, 1], None, 4, "pages: 2 pages for 1 records"),
        ([0, 8], None, 8, "pages: 8 is not one of the pool's 8"),
        ([-1], None, 4, "pages: -1 is not"),
        ([1, 2], [0], 8, "pages: 2 pages for 1 records"),
    ],
)
def test_a_write_that_does_not_fit_is_refused_and_has_written_nothing(pages, rows, tokens, named):
    p = pool()
    with pytest.raises(ValueError, match=named):
        p.write(pages, p.pack(block(tokens)), rows)
    assert not p.read(range(8)).data.any()


def test_other_shapes_and_precisions_are_refused_by_name():
    p = pool()
    with pytest.raises(ValueError, match=r"block\.keys: shape \(2, 2, 4, 16\).*\(3, 2, 4, 16\)"):
        p.pack(block(4, layers=2))
    with pytest.raises(ValueError, match="packed: made for pages of another shape or precision"):
        p.write([0], pool(dtype=torch.bfloat16).pack(block(4)))
    with pytest.raises(ValueError, match="out: room for 1 pages, 5 tokens take 2"):
        p.layout.pack(block(5), p.layout.empty(1))
    for field, value in (("kv_heads", 0), ("head_dim", -1), ("page_tokens", 0), ("num_layers", -1)):
        with pytest.raises(ValueError, match=f"{field}: {value} must"):
            pool(**{field: value})
    with pytest.raises(ValueError, match=r"dtype: torch\.float64 is none of torch\.float32"):
        pool(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"num_pages: 0 .*pool_gib"):
        pool(pages=0)


def test_fault14_numbers_beyond_float16_are_refused_where_the_pool_holds_it():
    b = block(4)
    b.values[2, 1, 3, 0] = 70000.0
    with pytest.raises(ValueError, match=r"block: torch\.float32 numbers beyond float16's range"):
        pool(dtype=torch.float16).pack(b)
    for dtype in (torch.bfloat16, torch.int8):
        pool(dtype=dtype).pack(b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_model_stage_without_memory_layers_has_pages_of_almost_nothing(dtype):
    p = pool(dtype=dtype, num_layers=0)
    p.write([0, 3], p.pack(block(8, layers=0)))
    assert p.nbytes == 8 * 256
