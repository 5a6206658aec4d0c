"""``select_tokens`` against the specification in fp64, wherever it runs, and the facts about it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.memory_selection import reference, select_tokens, selection_torch, selection_weights
from mem_triton.ops.memory_selection.selection_torch import top_tokens
from mem_triton.ops.reposition import RotaryEmbedding, rotate
from tests.ops.selection_case import SelectionCase, assert_picks, assert_weights, make_case
from tests.support.interp import sanitize
from tests.support.pairwise import pairs
from tests.support.places import by_kernels, cases, device_of, everywhere, on_gpu

MODES = reference.MODES


def weights_of(case: SelectionCase, place: str, order: str = "forward") -> torch.Tensor:
    """The runner. In the interpreter NaN stands in the output until it is written, and no finding may be made."""
    if place != "interpreter":
        q, k, valid = (None if x is None else x.to(device_of(place)) for x in (case.q, case.k, case.valid))
        return selection_weights(q, k, valid, scale=case.scale, mode=case.mode).cpu()
    from mem_triton.ops.memory_selection import launch

    empty, torch.empty = torch.empty, lambda *shape, **kw: torch.full(shape, torch.nan, **kw)
    try:
        with sanitize(order) as findings:
            weights = launch.log_weights(case.q, case.k, case.valid, case.scale, case.mode == "softmax")
    finally:
        torch.empty = empty
    assert not findings, "\n".join(findings)
    return weights


def select(case: SelectionCase, keep: int = 8, place: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    if place == "interpreter":
        return top_tokens(weights_of(case, place), case.flags, keep), case.flags.sum(1).clamp(max=keep).int()
    q, k, valid = (None if x is None else x.to(device_of(place)) for x in (case.q, case.k, case.valid))
    indices, count = select_tokens(q, k, keep=keep, valid=valid, mode=case.mode, scale=case.scale)
    return indices.cpu(), count.cpu()


def check(case: SelectionCase, place: str, keep: int = 8, order: str = "forward") -> None:
    weights = weights_of(case, place, order)
    assert_weights(weights, case)
    if place == "interpreter":
        picks = top_tokens(weights, case.flags, keep), case.flags.sum(1).clamp(max=keep).int()
    else:
        picks = select(case, keep, place)
    assert_picks(*picks, case, keep)


SMALL = [((5, 1), 80), ((4, 2), 128), ((2, 2), 32), ((2, 1), 96)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads,head_dim", SMALL)
@everywhere
def test_every_shape(mode, heads, head_dim, place):
    check(make_case([40, 17], 44, heads=heads, head_dim=head_dim, prefix=3, mode=mode), place, order="shuffle")


LENGTHS = {"cpu": (1, 16, 100, 200), "interpreter": (1, 16, 100, 128, 200), "gpu": (1, 16, 100, 128, 200)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place,tokens", cases(*((place, n) for place, lengths in LENGTHS.items() for n in lengths)))
def test_every_length_and_dtype(dtype, tokens, place):
    check(make_case([tokens], heads=(2, 1), dtype=dtype), place, order="reverse")


@pairs(
    {
        "mode": MODES,
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "tokens": [1, 37, 128, 512, 700],  # the last one by torch
        "heads,head_dim": [((40, 8), 80), ((32, 8), 128), ((6, 2), 32)],
    }
)
@on_gpu
def test_the_shapes_of_models(mode, dtype, tokens, heads, head_dim, place):
    check(make_case([tokens, tokens // 2], heads=heads, head_dim=head_dim, dtype=dtype, mode=mode), place)


@everywhere
def test_without_flags_all_tokens_count(place):
    case = make_case([30, 30])
    all_valid = SelectionCase(case.q, case.k, None, case.scale, case.mode)
    assert torch.equal(weights_of(all_valid, place), weights_of(case, place))


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
@by_kernels
def test_any_references_by_the_kernel(lengths, padding, prefix, heads, head_dim, size, mode, place):
    tokens, shape = max(max(lengths) + prefix + padding, 1), {"heads": heads, "head_dim": head_dim, "prefix": prefix}
    check(make_case(lengths, tokens, **shape, size=size, mode=mode), place)


@pytest.mark.parametrize("mode", MODES)
@by_kernels
def test_b3_padding_changes_no_bit(mode, place):
    """Up to the next power of two of tokens a program's sums run in the same order, with zeros behind."""
    case = make_case([20, 31], mode=mode)
    padded = make_case([20, 31], 32, mode=mode)
    padded.q[:, :31], padded.k[:, :31] = case.q, case.k
    assert torch.equal(weights_of(padded, place)[..., :31], weights_of(case, place))


@everywhere
def test_the_oracle_sees_a_wrong_weight_and_a_wrong_pick(place):
    """Negative control: one log weight by a thousandth, a scale, a pick exchanged for the next best."""
    case = make_case([40])
    weights = weights_of(case, place)
    spoiled = weights.clone()
    spoiled[0, 1, 7] += 1e-3
    with pytest.raises(AssertionError):
        assert_weights(spoiled, case)
    with pytest.raises(AssertionError):
        assert_weights(weights_of(SelectionCase(case.q, case.k, case.valid, case.scale * 1.01, case.mode), place), case)
    picks = top_tokens(weights, case.flags, 8)
    worst = int(weights[0, 0].argmin())
    picks[0, 0] = torch.tensor(sorted({*picks[0, 0].tolist()[1:], worst}))
    with pytest.raises(AssertionError):
        assert_picks(picks, torch.tensor([8], dtype=torch.int32), case, 8)


@everywhere
def test_equal_tokens_weigh_the_same_and_runs_are_bit_equal(place):
    g = torch.Generator().manual_seed(0)
    words, text = torch.randn(6, 3, 64, generator=g), torch.randint(6, (128,), generator=g)
    case = SelectionCase(words[text][None, :, :2], words[text][None, :, 2:], None, 64**-0.5, "softmax")
    weights = weights_of(case, place)
    assert all(len(weights[0, 0][text == word].unique()) == 1 for word in range(6))
    assert torch.equal(weights_of(case, place), weights)


@on_gpu
def test_no_host_sync(place):
    case = make_case([128, 90])
    q, k, valid = (x.to(device_of(place)) for x in (case.q, case.k, case.flags))
    select_tokens(q, k, valid=valid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_tokens(q, k, valid=valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- on a CPU ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    prefix=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    head_dim=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    size=st.sampled_from([0.1, 1.0, 10.0]),
    mode=st.sampled_from(MODES),
    keep=st.integers(1, 12),
    scratch=st.sampled_from([1, 5000, 64 << 20]),
)
def test_any_references(lengths, padding, prefix, heads, head_dim, dtype, size, mode, keep, scratch):
    """Also where logits are so large that plain exponentials overflow, and in slices of any size."""
    case = make_case(
        lengths,
        max(max(lengths) + prefix + padding, 1),
        heads=heads,
        head_dim=head_dim,
        prefix=prefix,
        dtype=dtype,
        size=size,
        mode=mode,
    )
    before, selection_torch.SCRATCH_BYTES = selection_torch.SCRATCH_BYTES, scratch
    try:
        weights = selection_weights(case.q, case.k, case.valid, scale=case.scale, mode=mode)
        indices, count = select(case, keep)
    finally:
        selection_torch.SCRATCH_BYTES = before
    assert_weights(weights, case)
    assert_picks(indices, count, case, keep)


@pytest.mark.parametrize("mode", MODES)
def test_the_specification_is_the_papers_formula(mode):
    """Weight by weight in Python floats: every valid token looks at every valid one, later ones included."""
    case = make_case([7, 4], prefix=1, heads=(4, 2), head_dim=3, dtype=torch.float64, mode=mode)
    got = selection_weights(case.q, case.k, case.valid, mode=mode)
    for b in range(2):
        valid = case.valid[b].nonzero()[:, 0].tolist()
        for head in range(2):
            weight = dict.fromkeys(valid, 0.0)
            for query_head in (2 * head, 2 * head + 1):
                for i in valid:
                    e = {
                        j: math.exp(
                            sum(
                                a * c
                                for a, c in zip(
                                    case.q[b, i, query_head].tolist(), case.k[b, j, head].tolist(), strict=True
                                )
                            )
                            / math.sqrt(3)
                        )
                        for j in valid
                    }
                    for j in valid:
                        weight[j] += e[j] / sum(e.values()) if mode == "softmax" else e[j]
            for j in valid:
                assert math.exp(got[b, head, j]) == pytest.approx(weight[j], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_b2_permuting_tokens_permutes_the_picks(mode):
    """Selection sees q and k before RoPE and no positions, so it cannot tell where a token stands."""
    case = make_case([128] * 2, heads=(8, 2), head_dim=32, mode=mode)
    indices, _ = select(case)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    permuted = SelectionCase(case.q[:, order], case.k[:, order], case.valid, case.scale, mode)
    again, _ = select(permuted)
    assert torch.equal(order[again.long()].sort(-1).values.int(), indices)
    # Negative control: with RoPE in q and k, moving tokens changes what is kept.
    rope = RotaryEmbedding(32, tuple(10000 ** (-i / 16) for i in range(16)))
    positions = torch.arange(128)

    def turned(x):
        return rotate(x.transpose(1, 2), positions, rope).transpose(1, 2)

    with_rope, _ = select(SelectionCase(turned(case.q), turned(case.k), case.valid, case.scale, mode))
    permuted_with_rope, _ = select(SelectionCase(turned(permuted.q), turned(permuted.k), case.valid, case.scale, mode))
    assert not torch.equal(order[permuted_with_rope.long()].sort(-1).values.int(), with_rope)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 60])
def test_b3_padding_and_prefix_are_never_chosen_and_short_references_are_kept_whole(mode, length):
    case = make_case([length, 60], 80, prefix=4, mode=mode)
    indices, count = select(case)
    assert count.tolist() == [min(length, 8), 8]
    kept = indices[indices >= 0]
    assert kept.min() >= 4 and kept.max() < 64 and (indices[0] < 4 + length).all()
    if length <= 8:
        assert indices[0].tolist() == [[*range(4, 4 + length), *[-1] * (8 - length)]] * 2
    # What stands in the padding and the prefix does not matter: here NaN, there a token that would win.
    filled = SelectionCase(case.q.nan_to_num(9.0), case.k.nan_to_num(9.0), case.valid, case.scale, mode)
    again, _ = select(filled)
    assert torch.equal(again, indices)
    # Negative control: without the flags such tokens do win.
    without, _ = select_tokens(filled.q, filled.k, mode=mode)
    assert (without[0] < 4).any() or (without[0] >= 4 + length).any()


def test_b3_nothing_valid_or_more_kept_than_there_is():
    case = make_case([0, 3], 3)
    indices, count = select(case, keep=5)
    assert count.tolist() == [0, 3]
    assert indices[0].tolist() == [[-1] * 5] * 2 and indices[1].tolist() == [[0, 1, 2, -1, -1]] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens,head_dim", [(51, 23), (64, 32), (77, 45), (101, 62), (128, 80)])
def test_equal_tokens_go_to_the_lower_index_alone_or_in_a_batch(mode, tokens, head_dim):
    """In a model's first layer every repetition of a word has the same q and k: such ties are the rule."""
    g = torch.Generator().manual_seed(tokens)
    words, text = torch.randn(6, 3, head_dim, generator=g) * 2, torch.randint(6, (tokens,), generator=g)
    q, k = words[text][None, :, :2], words[text][None, :, 2:]
    weights = selection_weights(q, k, mode=mode)[0, 0]
    for word in range(6):
        assert len(weights[text == word].unique()) == 1
    indices, _ = select_tokens(q, k, mode=mode)
    order = sorted(range(tokens), key=lambda j: (-weights[j].item(), j))
    assert indices[0, 0].tolist() == sorted(order[:8])
    # The same picks in a batch and behind padding.
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 33), value=torch.nan).repeat(3, 1, 1, 1) for x in (q, k)]
    valid = (torch.arange(tokens + 33) < tokens).expand(3, -1)
    assert torch.equal(select_tokens(*padded, valid=valid, mode=mode)[0], indices.expand(3, -1, -1))


def test_softmax_and_exp_sum_differ():
    """The normaliser keeps one loud query from outvoting all others."""
    case = make_case([32], head_dim=8, heads=(1, 1))
    case.q[0, 0] *= 30
    picks = [select(SelectionCase(case.q, case.k, case.valid, case.scale, mode))[0] for mode in MODES]
    assert not torch.equal(*picks)


def test_query_heads_of_a_group_are_added():
    case = make_case([40], heads=(4, 2), head_dim=8)
    for head in range(2):
        alone = select_tokens(case.q[:, :, 2 * head : 2 * head + 2], case.k[:, :, head : head + 1])[0]
        assert torch.equal(alone[:, 0], select(case)[0][:, head])


def test_opcheck():
    for mode in (True, False):
        case = make_case([9, 4], dtype=torch.float32)
        torch.library.opcheck(
            torch.ops.mem_triton.selection_weights,
            (case.q.nan_to_num(), case.k.nan_to_num(), case.valid),
            {"scale": 0.25, "normalize": mode},
        )


def test_a_compiled_caller_gets_the_same_as_an_eager_one():
    case = make_case([20, 11])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, valid):
        return select_tokens(q, k, valid=valid)

    for got, want in zip(step(case.q, case.k, case.valid), select(case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(2, 5, 4)}, r"^q: .*\[B, T, Hq, D\]"),
        ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int32)}, r"^q: torch.int32"),
        ({"q": torch.zeros(2, 5, 3, 8)}, r"^q: 3 heads are not a multiple of the 2 KV heads"),
        ({"q": torch.zeros(2, 5, 8, 4).transpose(2, 3)}, r"^q: the last dimension"),
        ({"k": torch.zeros(2, 6, 2, 8)}, r"^k: shape \(2, 6, 2, 8\)"),
        ({"k": torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)}, r"^k: dtype torch.bfloat16"),
        ({"valid": torch.ones(2, 5)}, r"^valid: torch.float32"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, r"^valid: .*\(5,\)"),
        ({"keep": 0}, r"^keep=0"),
        ({"mode": "max"}, r"^mode='max': expected one of"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    arguments = {"q": torch.zeros(2, 5, 4, 8), "k": torch.zeros(2, 5, 2, 8), **change}
    with pytest.raises(ValueError, match=message):
        select_tokens(arguments.pop("q"), arguments.pop("k"), **arguments)
