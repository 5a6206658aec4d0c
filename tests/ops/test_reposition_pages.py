"""``reposition_pages`` on the CPU against complex numbers in fp64, and its checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.reposition import reposition_pages
from tests.ops.reposition_case import RepositionCase, assert_moved, make_case, make_rope


def run(case: RepositionCase) -> RepositionCase:
    after = case.clone()
    reposition_pages(after.pool, case.positions, case.rope, **case.options())
    return after


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rotary=st.integers(0, 20),
    rest=st.integers(0, 9),
    page_size=st.integers(1, 32),
    heads=st.integers(1, 4),
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
