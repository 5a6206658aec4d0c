"""The chunk-parallel torch scan is the recurrence: values, states at any token, gradients, extreme gates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.ops.delta_rule import DeltaRuleInputs, DeltaRuleSpec, activate, delta_rule
from mem_triton.ops.delta_rule.chunked import scan
from tests.ops.paged_case import relative_rms

MODES = ("standard", "lambda_outside", "no_lambda")


def random_inputs(batch: int, tokens: int, spec: DeltaRuleSpec, seed: int = 0, dtype=torch.float64) -> DeltaRuleInputs:
    g = torch.Generator().manual_seed(seed)
    projections = torch.randn(batch, tokens, spec.projection_width, generator=g, dtype=dtype)
    return activate(projections, torch.randn(spec.bias_width, generator=g, dtype=dtype) - 1, spec)


def random_state(batch: int, spec: DeltaRuleSpec, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(99)
    return torch.randn(batch, spec.heads, spec.rank, spec.rank, generator=g, dtype=torch.float64).to(dtype)


def token_by_token(inputs: DeltaRuleInputs, state: torch.Tensor | None, every: int | None = None):
    """``delta_rule`` over a batch of equal lengths: reads [B, T, H, r], final [B, H, r, r], states [B, n, H, r, r]."""
    batch, tokens = inputs.q.shape[:2]
    starts = torch.arange(batch + 1) * tokens
    reads, final, states = delta_rule(DeltaRuleInputs(*(x.flatten(0, 1) for x in inputs)), state, starts, every)
    return reads.view_as(inputs.q), final, torch.stack(states)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40, 100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("couple,rankwise", [(True, True), (False, True), (False, False)])
def test_a11_chunk_parallel_scan_equals_sequential(tokens, mode, couple, rankwise):
    spec = DeltaRuleSpec(8, 2, rankwise, couple, mode)
    inputs, state = random_inputs(2, tokens, spec), random_state(2, spec)
    reads, final = scan(inputs, state)
    want_reads, want_final, _ = token_by_token(inputs, state)
    torch.testing.assert_close(reads, want_reads, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, want_final, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_a3_any_split_gives_the_same_reads_and_state(lengths):
    spec = DeltaRuleSpec(8, 2, couple_lambda=False)
    inputs = random_inputs(1, sum(lengths), spec)
    reads, final = scan(inputs)
    state, parts = None, []
    for part in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True):
        seen, state = scan(DeltaRuleInputs(*part), state)
        parts.append(seen)
    torch.testing.assert_close(torch.cat(parts, dim=1), reads, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("pattern", ["always", "sometimes", "tiny"])
def test_gates_of_exactly_zero_and_one(dtype, tolerance, pattern):
    """keep underflows to 0 when lambda saturates; a log or a division would make NaN of it."""
    spec = DeltaRuleSpec(8, 1, couple_lambda=False)
    inputs = random_inputs(1, 70, spec, dtype=dtype)
    keep = inputs.keep.clone()
    keep[:, {"always": slice(None), "sometimes": slice(3, None, 7), "tiny": slice(2, None, 3)}[pattern]] = (
        1e-40 if pattern == "tiny" else 0.0
    )
    keep[:, 5], inputs.erase[:, 5], inputs.write[:, 5] = 1.0, 0.0, 0.0
    inputs = inputs._replace(keep=keep.requires_grad_())
    reads, final = scan(inputs, random_state(1, spec, dtype))
    exact = DeltaRuleInputs(*(x.detach().double() for x in inputs))
    want = token_by_token(exact, random_state(1, spec, dtype).double())
    assert relative_rms(reads.detach(), want[0]) <= tolerance
    assert relative_rms(final.detach(), want[1]) <= tolerance
    (gradient,) = torch.autograd.grad(reads.square().sum() + final.sum(), keep)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a6_padding_never_changes_state_or_reads(side):
    spec = DeltaRuleSpec(8, 2)
    g = torch.Generator().manual_seed(0)
    projections = torch.randn(1, 21, spec.projection_width, generator=g, dtype=torch.float64)
    bias = torch.zeros(spec.bias_width)
    mask = torch.ones(1, 21, dtype=torch.bool)
    mask[:, slice(0, 8) if side == "left" else slice(13, 21)] = False
    reads, final = scan(activate(projections, bias, spec, mask))
    want_reads, want_final = scan(activate(projections[mask][None], bias, spec))
    torch.testing.assert_close(reads[mask][None], want_reads, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, want_final, rtol=0, atol=1e-12)
    assert (reads[~mask] == 0).all()


def test_frozen_tokens_leave_the_state_bit_identical():
    spec = DeltaRuleSpec(8, 2)
    inputs = random_inputs(1, 40, spec, dtype=torch.float32)
    ones, zeros = torch.ones_like(inputs.keep), torch.zeros_like(inputs.keep)
    state = random_state(1, spec, torch.float32)
    reads, final = scan(inputs._replace(keep=ones, erase=zeros, write=zeros), state)
    assert torch.equal(final, state)
    torch.testing.assert_close(reads, torch.einsum("bhij,bthj->bthi", state, inputs.q))


def test_gradients_match_finite_differences():
    spec = DeltaRuleSpec(4, 2, couple_lambda=False)
    g = torch.Generator().manual_seed(0)
    projections = torch.randn(1, 7, spec.projection_width, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(spec.bias_width, generator=g, dtype=torch.float64, requires_grad=True)
    state = random_state(1, spec).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, b, s: scan(activate(p, b, spec), s, chunk_size=3), (projections, bias, state)
    )


def test_gradients_match_the_token_loop():
    spec = DeltaRuleSpec(8, 2)
    inputs = DeltaRuleInputs(*(x.detach().requires_grad_() for x in random_inputs(2, 50, spec)))
    state = random_state(2, spec).requires_grad_()
    weight = torch.randn(2, 50, 2, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def gradients(run):
        reads, final = run(inputs, state)[:2]
        return torch.autograd.grad((reads * weight).sum() + final.square().sum(), [*inputs, state])

    for got, want in zip(gradients(scan), gradients(token_by_token), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [-1.5, -4.0])
def test_8192_tokens_stay_within_1e_5_of_fp64(bias):
    spec = DeltaRuleSpec(8, 1)
    projections = torch.randn(1, 8192, spec.projection_width, generator=torch.Generator().manual_seed(0))
    gate_bias = torch.full((spec.bias_width,), bias)
    reads, final = scan(activate(projections, gate_bias, spec))
    want = token_by_token(activate(projections.double(), gate_bias.double(), spec), None)
    assert relative_rms(reads, want[0]) <= 1e-5
    assert relative_rms(final, want[1]) <= 1e-5
