"""The selection kernel against the specification in fp64, with memory watched and outputs poisoned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.memory_selection import launch
from mem_triton.ops.memory_selection.reference import MODES
from mem_triton.ops.memory_selection.selection_torch import top_tokens
from tests.ops.selection_case import SelectionCase, assert_picks, assert_weights, make_case
from tests.support.interp import sanitize


def run(case: SelectionCase, order: str = "forward") -> torch.Tensor:
    """The weights; fails on any finding of the memory checker. NaN stands in the output until it is written."""
    empty, torch.empty = torch.empty, lambda *shape, **kw: torch.full(shape, torch.nan, **kw)
    try:
        with sanitize(order) as findings:
            weights = launch.log_weights(case.q, case.k, case.valid, case.scale, case.mode == "softmax")
    finally:
        torch.empty = empty
    assert not findings, "\n".join(findings)
    return weights


def check(case: SelectionCase, keep: int = 8, order: str = "forward") -> None:
    weights = run(case, order)
    assert_weights(weights, case)
    assert_picks(top_tokens(weights, case.flags, keep), case.flags.sum(1).clamp(max=keep).int(), case, keep)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads,head_dim", [((5, 1), 80), ((4, 2), 128), ((2, 2), 32), ((2, 1), 96)])
def test_every_shape(mode, heads, head_dim):
    check(make_case([40, 17], 44, heads=heads, head_dim=head_dim, prefix=3, mode=mode), order="shuffle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 100, 128, 200])
def test_every_length_and_dtype(dtype, tokens):
    check(make_case([tokens], heads=(2, 1), dtype=dtype), order="reverse")


def test_without_flags_all_tokens_count():
    case = make_case([30, 30])
    all_valid = SelectionCase(case.q, case.k, None, case.scale, case.mode)
    assert torch.equal(run(all_valid), run(case))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    padding=st.integers(0, 4),
    prefix=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (6, 2)]),
    head_dim=st.sampled_from([1, 8, 20, 40]),
    size=st.sampled_from([0.1, 1.0, 10.0]),
    mode=st.sampled_from(MODES),
)
def test_any_references(lengths, padding, prefix, heads, head_dim, size, mode):
    check(
        make_case(
            lengths,
            max(max(lengths) + prefix + padding, 1),
            heads=heads,
            head_dim=head_dim,
            prefix=prefix,
            size=size,
            mode=mode,
        )
    )


@pytest.mark.parametrize("mode", MODES)
def test_b3_padding_changes_no_bit(mode):
    """Up to the next power of two of tokens a program's sums run in the same order, with zeros behind."""
    case = make_case([20, 31], mode=mode)
    padded = make_case([20, 31], 32, mode=mode)
    padded.q[:, :31], padded.k[:, :31] = case.q, case.k
    assert torch.equal(run(padded)[..., :31], run(case))


def test_the_oracle_sees_a_wrong_weight_and_a_wrong_pick():
    """Negative control: one log weight by a thousandth, a scale, a pick exchanged for the next best."""
    case = make_case([40])
    weights = run(case)
    spoiled = weights.clone()
    spoiled[0, 1, 7] += 1e-3
    with pytest.raises(AssertionError):
        assert_weights(spoiled, case)
    with pytest.raises(AssertionError):
        assert_weights(run(SelectionCase(case.q, case.k, case.valid, case.scale * 1.01, case.mode)), case)
    picks = top_tokens(weights, case.flags, 8)
    worst = int(weights[0, 0].argmin())
    picks[0, 0] = torch.tensor(sorted({*picks[0, 0].tolist()[1:], worst}))
    with pytest.raises(AssertionError):
        assert_picks(picks, torch.tensor([8], dtype=torch.int32), case, 8)
