"""The token-by-token form and the choice between the two forms."""

from __future__ import annotations

import pytest
import torch

from mem_triton.ops.delta_rule import DeltaRuleInputs, chunked, delta_rule, stepwise


def random_inputs(batch: int, tokens: int, heads: int = 2, rank: int = 8) -> DeltaRuleInputs:
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    q, k, v, *gates = torch.randn(6, batch, tokens, heads, rank, dtype=torch.float64, generator=generator)
    unit = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return DeltaRuleInputs(*unit, v, *(torch.sigmoid(gate) for gate in gates))


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_the_reference(tokens, carried):
    inputs = random_inputs(3, tokens)
    state = torch.randn(3, 2, 8, 8, dtype=torch.float64) if carried else None
    reads, final = stepwise.scan_tokens(inputs, state)
    for row in range(3):
        one = DeltaRuleInputs(*(x[row] for x in inputs))
        want, last, _ = delta_rule(one, None if state is None else state[row : row + 1])
        torch.testing.assert_close(reads[row], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(final[row], last[0], rtol=0, atol=1e-12)


def test_gradients_equal_the_chunked_form():
    results = []
    for scan in (stepwise.scan_tokens, chunked.scan):
        inputs = DeltaRuleInputs(*(x.clone().requires_grad_() for x in random_inputs(2, 21)))
        reads, final = scan(inputs)
        (reads.square().sum() + final.square().sum()).backward()
        results.append([x.grad for x in inputs])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_choice_follows_the_shape(monkeypatch):
    used = []
    for module, name in ((stepwise, "scan_tokens"), (chunked, "scan")):
        monkeypatch.setattr(module, name, lambda *a, _n=name, **k: used.append(_n))
    for batch, tokens in ((1, 1), (1, 100), (64, 100)):
        stepwise.scan(random_inputs(batch, tokens))
    assert used == ["scan_tokens", "scan", "scan_tokens"]
