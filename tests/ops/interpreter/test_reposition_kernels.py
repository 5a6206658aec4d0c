"""The reposition kernel against complex numbers in fp64, with memory watched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.reposition import launch
from mem_triton.ops.reposition.kernel_parts import cos_and_sin
from tests.ops.reposition_case import RepositionCase, assert_moved, make_case, make_rope
from tests.support.interp import sanitize


def run(case: RepositionCase, order: str = "forward") -> RepositionCase:
    """The case after the kernel ran on a copy of it; fails on any finding of the memory checker."""
    after = case.clone()
    source, source_page = (after.pool, after.page) if case.source is None else (case.source, case.source_page)
    with sanitize(order) as findings:
        launch.move_pages(after.pool, case.positions, case.page, source, source_page, case.old_positions, case.rope)
    assert not findings, "\n".join(findings)
    return after


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 24])
def test_every_shape(head_dim, page_size):
    case = make_case(make_rope(head_dim), head_dim=head_dim, page_size=page_size, seed=head_dim)
    assert_moved(run(case, "shuffle"), case)


@pytest.mark.parametrize("in_place", [False, True], ids=["load", "in_place"])
@pytest.mark.parametrize("move", [False, True], ids=["from_before_rope", "from_old_positions"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_every_mode(in_place, move, interleaved):
    rope = make_rope(32, factor=1.25, interleaved=interleaved)
    case = make_case(rope, in_place=in_place, move=move, dtype=torch.bfloat16)
    assert_moved(run(case, "reverse"), case)


@pytest.mark.parametrize("rotary_dim", [0, 2, 20, 40])
def test_channels_that_do_not_turn_are_copied(rotary_dim):
    case = make_case(make_rope(rotary_dim), head_dim=40)
    after = run(case)
    assert_moved(after, case)
    target, origin = int(case.page[0]), int(case.source_page[0])
    assert torch.equal(after.pool[target][..., rotary_dim:], case.source[origin][..., rotary_dim:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rotary=st.integers(0, 12),
    rest=st.integers(0, 5),
    page_size=st.integers(1, 20),
    heads=st.integers(1, 3),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.bfloat16),
            (torch.float32, torch.float16),
        ]
    ),
    in_place=st.booleans(),
    move=st.booleans(),
    listed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_pages(rotary, rest, page_size, heads, dtypes, in_place, move, listed, seed):
    rope = make_rope(2 * rotary, factor=1.5, interleaved=seed % 2 == 0) if rotary else make_rope(0)
    case = make_case(
        rope,
        heads=heads,
        page_size=page_size,
        head_dim=max(2 * rotary + rest, 1),
        dtype=dtypes[0],
        source_dtype=dtypes[1],
        in_place=in_place,
        move=move,
        listed=listed,
        seed=seed,
    )
    assert_moved(run(case), case)


@triton.jit
def trigonometry_kernel(quarters, cos, sin, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c, s = cos_and_sin(tl.load(quarters + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


@pytest.mark.parametrize("reach", [1.0, 1e3, 1e6])
def test_cosine_and_sine_are_good_to_an_ulp_anywhere(reach):
    g = torch.Generator().manual_seed(0)
    quarters = (torch.rand(4096, generator=g, dtype=torch.float64) * 2 - 1) * reach
    quarters[:9] = torch.arange(-4, 5).double() / 2  # the seams
    cos, sin = torch.full((4096,), float("nan")), torch.full((4096,), float("nan"))
    trigonometry_kernel[(1,)](quarters, cos, sin, BLOCK=4096)
    angle = quarters.numpy() * (np.pi / 2)
    for got, want in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert np.abs(got.double().numpy() - want).max() <= 1.5e-7


def test_far_positions_lose_nothing():
    case = make_case(make_rope(32), reach=1 << 20)
    assert_moved(run(case), case)


def test_the_checker_sees_a_page_that_is_listed_twice_or_not_there():
    """Negative control: two programs that write one page race; a page past the pool is out of bounds."""
    for page, finding in (([3, 3, -1], r"\[race\]"), ([3, 6, -1], r"\[oob\]")):
        case = make_case(make_rope(32))
        case.page = torch.tensor(page, dtype=torch.int32)
        with pytest.raises(AssertionError, match=finding):
            run(case)


def test_the_oracle_sees_wrong_keys():
    """Negative control of ``assert_moved``: one element by a hundredth, a position by one, another page touched."""
    case = make_case(make_rope(32))
    unlisted = next(n for n in range(6) if n not in case.page.tolist())
    for spoil in (
        lambda pool: pool[int(case.page[0]), 0, 3, 5].mul_(1.01),
        lambda pool: pool[unlisted, 1, 2, 3].add_(1e-6),
    ):
        after = run(case)
        spoil(after.pool)
        with pytest.raises(AssertionError):
            assert_moved(after, case)
    after = run(case)
    case.positions[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_moved(after, case)
