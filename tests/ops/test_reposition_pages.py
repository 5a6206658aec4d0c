"""``reposition_pages`` against complex numbers in fp64, wherever it runs, and its checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.reposition import reposition_pages
from mem_triton.ops.reposition.kernel_parts import cos_and_sin
from tests.ops.reposition_case import RepositionCase, assert_moved, make_case, make_rope
from tests.support.interp import sanitize
from tests.support.pairwise import pairs
from tests.support.places import by_kernels, device_of, everywhere, interpreted, on_gpu


def run(case: RepositionCase, place: str = "cpu", order: str = "forward") -> RepositionCase:
    """The runner: the case after the op ran on a copy of it. In the interpreter no finding may be made."""
    after = case.clone()
    if place != "interpreter":
        after = after.to(device_of(place))
        reposition_pages(after.pool, after.positions, after.rope, **after.options())
        return after.to("cpu")
    from mem_triton.ops.reposition import launch

    source, source_page = (after.pool, after.page) if case.source is None else (case.source, case.source_page)
    with sanitize(order) as findings:
        launch.move_pages(after.pool, case.positions, case.page, source, source_page, case.old_positions, case.rope)
    assert not findings, "\n".join(findings)
    return after


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 24])
@everywhere
def test_every_shape(head_dim, page_size, place):
    case = make_case(make_rope(head_dim), head_dim=head_dim, page_size=page_size, seed=head_dim)
    assert_moved(run(case, place, "shuffle"), case)


@pytest.mark.parametrize("in_place", [False, True], ids=["load", "in_place"])
@pytest.mark.parametrize("move", [False, True], ids=["from_before_rope", "from_old_positions"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@everywhere
def test_every_mode(in_place, move, interleaved, place):
    rope = make_rope(32, factor=1.25, interleaved=interleaved)
    case = make_case(rope, in_place=in_place, move=move, dtype=torch.bfloat16)
    assert_moved(run(case, place, "reverse"), case)


@pairs(
    {
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "head_dim,rotary_dim": [(32, 32), (80, 80), (96, 24), (128, 128), (256, 256), (64, 0)],
        "in_place,move": [(False, False), (True, False), (True, True)],
    }
)
@on_gpu
def test_the_shapes_of_models(dtype, head_dim, rotary_dim, in_place, move, place):
    rope = make_rope(rotary_dim, factor=1.2, interleaved=move) if rotary_dim else make_rope(0)
    case = make_case(rope, head_dim=head_dim, dtype=dtype, page_size=128, in_place=in_place, move=move, reach=100_000)
    assert_moved(run(case, place), case)


@pytest.mark.parametrize("rotary_dim", [0, 2, 20, 40])
@everywhere
def test_channels_that_do_not_turn_are_copied(rotary_dim, place):
    case = make_case(make_rope(rotary_dim), head_dim=40)
    after = run(case, place)
    assert_moved(after, case)
    target, origin = int(case.page[0]), int(case.source_page[0])
    assert torch.equal(after.pool[target][..., rotary_dim:], case.source[origin][..., rotary_dim:])


@everywhere
def test_far_positions_lose_nothing(place):
    case = make_case(make_rope(32), reach=1 << 20)
    assert_moved(run(case, place), case)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float16),
]


def pages(rotary: int, rest: int, page_size: int, heads: int) -> dict[str, st.SearchStrategy]:
    """Any pages up to these sizes."""
    return {
        "rotary": st.integers(0, rotary),
        "rest": st.integers(0, rest),
        "page_size": st.integers(1, page_size),
        "heads": st.integers(1, heads),
        "dtypes": st.sampled_from(DTYPES),
        "in_place": st.booleans(),
        "move": st.booleans(),
        "listed": st.booleans(),
        "seed": st.integers(0, 99),
    }


def check_any(place: str, rotary: int, rest: int, dtypes: tuple, seed: int, **options) -> None:
    rope = make_rope(2 * rotary, factor=1.5, interleaved=seed % 2 == 0) if rotary else make_rope(0)
    case = make_case(
        rope, head_dim=max(2 * rotary + rest, 1), dtype=dtypes[0], source_dtype=dtypes[1], seed=seed, **options
    )
    assert_moved(run(case, place), case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**pages(20, 9, 32, 4))
def test_any_pages(**drawn):
    check_any("cpu", **drawn)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**pages(12, 5, 20, 3))
@by_kernels
def test_any_pages_by_the_kernel(place, **drawn):
    check_any(place, **drawn)


@everywhere
def test_the_oracle_sees_wrong_keys(place):
    """Negative control of ``assert_moved``: one element by a hundredth, a position by one, another page touched."""
    case = make_case(make_rope(32))
    unlisted = next(n for n in range(6) if n not in case.page.tolist())
    for spoil in (
        lambda pool: pool[int(case.page[0]), 0, 3, 5].mul_(1.01),
        lambda pool: pool[unlisted, 1, 2, 3].add_(1e-6),
    ):
        after = run(case, place)
        spoil(after.pool)
        with pytest.raises(AssertionError):
            assert_moved(after, case)
    after = run(case, place)
    case.positions[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_moved(after, case)


@interpreted
def test_the_checker_sees_a_page_that_is_listed_twice_or_not_there(place):
    """Negative control: two programs that write one page race; a page past the pool is out of bounds."""
    for page, finding in (([3, 3, -1], r"\[race\]"), ([3, 6, -1], r"\[oob\]")):
        case = make_case(make_rope(32))
        case.page = torch.tensor(page, dtype=torch.int32)
        with pytest.raises(AssertionError, match=finding):
            run(case, place)


@triton.jit
def trigonometry_kernel(quarters, cos, sin, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c, s = cos_and_sin(tl.load(quarters + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


@pytest.mark.parametrize("reach", [1.0, 1e3, 1e6])
@by_kernels
def test_cosine_and_sine_are_good_to_an_ulp_anywhere(reach, place):
    g, device = torch.Generator().manual_seed(0), device_of(place)
    quarters = (torch.rand(4096, generator=g, dtype=torch.float64) * 2 - 1) * reach
    quarters[:9] = torch.arange(-4, 5).double() / 2  # the seams
    cos, sin = (torch.full((4096,), float("nan"), device=device) for _ in range(2))
    trigonometry_kernel[(1,)](quarters.to(device), cos, sin, BLOCK=4096)
    angle = quarters.numpy() * (np.pi / 2)
    for got, want in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert np.abs(got.cpu().double().numpy() - want).max() <= 1.5e-7


@on_gpu
def test_graph_replay_equals_eager_and_a_negative_page_is_skipped(place):
    case = make_case(make_rope(128), head_dim=128, dtype=torch.bfloat16)
    eager, static = run(case, place), case.clone().to("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reposition_pages(static.pool, static.positions, static.rope, **static.options())
    static.pool.copy_(case.pool)
    graph.replay()
    assert torch.equal(static.pool.cpu(), eager.pool)
    static.pool.copy_(case.pool)
    static.page.fill_(-1)
    graph.replay()
    assert torch.equal(static.pool.cpu(), case.pool)


@on_gpu
def test_no_host_sync(place):
    case = make_case(make_rope(128), head_dim=128).to("cuda")
    reposition_pages(case.pool, case.positions, case.rope, **case.options())
    torch.cuda.set_sync_debug_mode("error")
    try:
        reposition_pages(case.pool, case.positions, case.rope, **case.options())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_opcheck():
    """The declared mutation, the fake implementation and the traced op agree with what runs."""
    rope = make_rope(32, factor=1.2)
    fields = {**vars(rope), "inv_freq": list(rope.inv_freq)}
    for options in ({}, {"in_place": True, "move": True, "listed": False}):
        case = make_case(rope, **options)
        torch.library.opcheck(torch.ops.mem_triton.reposition_pages, case.tensors(), fields)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_caller_gets_the_same_as_an_eager_one(in_place):
    case = make_case(make_rope(32), in_place=in_place)
    eager, traced = run(case), case.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pool, positions, **options):
        reposition_pages(pool, positions, case.rope, **options)

    step(traced.pool, case.positions, **case.options())
    assert torch.equal(traced.pool, eager.pool)


@pytest.mark.parametrize(
    "name,spoil",
    [
        ("pool", lambda t: t[0]),
        ("pool", lambda t: t.double()),
        ("pool", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        ("positions", lambda t: t[:, :1]),
        ("positions", lambda t: t.long()),
        ("page", lambda t: t[:2]),
        ("page", lambda t: t.long()),
        ("source", lambda t: t[:, :1]),
        ("source", lambda t: t.to(torch.int8)),
        ("source_page", lambda t: t[:2]),
        ("old_positions", lambda t: t[:, :, :3]),
        ("old_positions", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, spoil):
    case = make_case(make_rope(32), move=True)
    setattr(case, name, spoil(getattr(case, name)))
    with pytest.raises(ValueError, match=f"^{name}: "):
        reposition_pages(case.pool, case.positions, case.rope, **case.options())


def test_lists_that_make_no_sense_are_refused():
    case = make_case(make_rope(32))
    with pytest.raises(ValueError, match=r"^source_page: in place"):
        reposition_pages(case.pool, case.positions, case.rope, source_page=case.source_page)
    with pytest.raises(ValueError, match=r"^source_page: None lists the first 3 pages, there are 2"):
        reposition_pages(case.pool, case.positions, case.rope, source=case.source[:2])
    with pytest.raises(ValueError, match=r"^page: None lists the first 3 pages, there are 2"):
        reposition_pages(case.pool[:2], case.positions, case.rope)
    with pytest.raises(ValueError, match=r"^rope: turns 64 channels, the pool's heads have 32"):
        reposition_pages(case.pool, case.positions, make_rope(64))
