"""The repaired interpreter computes what a GPU would, and its checker finds planted errors (and nothing else)."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.interp import sanitize


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def overrunning_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0))


@triton.jit
def shared_cell_kernel(x, out):
    tl.store(out, tl.load(x + tl.program_id(0)))


@triton.jit
def neighbour_kernel(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + BLOCK))


@triton.jit
def duplicate_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(x + i))


@triton.jit
def unmasked_sum_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def masked_scalar_kernel(x, out, there):
    tl.store(out, tl.load(x, mask=there != 0, other=0.0))
    tl.store(out + 1, tl.load(x, mask=there != 0))


@triton.jit
def order_kernel(out, counter):
    tl.store(out + tl.atomic_add(counter, 1), tl.program_id(0))


@triton.jit
def last_sums_kernel(x, partial, counter, out, SEMANTICS: tl.constexpr):
    me, all_programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partial + me, tl.load(x + me) * 2)
    if tl.atomic_add(counter, 1, sem=SEMANTICS) == all_programs - 1:
        total = 0.0
        for i in range(all_programs):
            total += tl.load(partial + i)
        tl.store(out, total)


@triton.jit
def dot_kernel(a, b, out, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    product = tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * 16 + i[None, :]))
    tl.store(out + i[:, None] * 16 + i[None, :], product)


def test_bf16_arithmetic_and_rounding_match_torch():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=g).bfloat16() for _ in range(2))
    out = torch.full((1000,), float("nan"), dtype=torch.bfloat16)
    with sanitize() as findings:
        add_kernel[(8,)](x, y, out, 1000, BLOCK=128)
    assert not findings
    assert torch.equal(out, x + y)


def test_bf16_dot_matches_torch():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=g).bfloat16(), torch.randn(32, 16, generator=g).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, K=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_finds_a_store_behind_the_end():
    x, out = torch.zeros(100), torch.zeros(100)
    with sanitize() as findings:
        overrunning_kernel[(1,)](x, out, 100, BLOCK=128)
    assert len(findings) == 1 and "[oob]" in findings[0] and "out[100] of 100" in findings[0], findings


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_finds_two_writers_and_a_reader_of_a_written_cell(order: str):
    with sanitize(order) as findings:
        shared_cell_kernel[(2,)](torch.arange(2.0), torch.zeros(1))
    assert len(findings) == 1 and "[race]" in findings[0], findings
    with sanitize(order) as findings:
        neighbour_kernel[(3,)](torch.arange(64.0), BLOCK=16)
    assert findings and all("[race]" in line for line in findings), findings


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_an_atomic_orders_what_was_stored_before_it_if_it_releases_and_acquires(order: str):
    x, out = torch.arange(5.0), torch.zeros(1)
    for semantics, ordered in (("acq_rel", True), ("relaxed", False), ("release", False), ("acquire", False)):
        with sanitize(order) as findings:
            last_sums_kernel[(5,)](x, torch.zeros(5), torch.zeros(1, dtype=torch.int32), out, SEMANTICS=semantics)
        assert out.item() == 20 and bool(findings) != ordered, (semantics, findings)


def test_finds_lanes_that_disagree_about_one_address():
    with sanitize() as findings:
        duplicate_kernel[(1,)](torch.arange(16.0), torch.zeros(8), BLOCK=16)
    assert len(findings) == 1 and "[dup]" in findings[0], findings


def test_poison_shows_the_use_of_masked_lanes():
    out = torch.zeros(1)
    with sanitize() as findings:
        unmasked_sum_kernel[(1,)](torch.ones(16), out, 10, BLOCK=16)
    assert not findings and out.isnan().all()


def test_poison_spares_a_scalar_that_has_a_zero_for_its_mask():
    out = torch.zeros(2)
    with sanitize() as findings:
        masked_scalar_kernel[(1,)](torch.ones(1), out, 0)
    assert not findings and out[0] == 0 and out[1].isnan()


def test_order_of_programs():
    for order, wanted in (("forward", [0, 1, 2, 3]), ("reverse", [3, 2, 1, 0])):
        out, counter = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with sanitize(order) as findings:
            order_kernel[(4,)](out, counter)
        assert not findings and out.tolist() == wanted
