"""δ-mem's projections in the model's own matmul: what it gives, updates of weights, and when it cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mem_triton.systems.delta_mem.folding import ALIGNMENT, fold
from mem_triton.systems.delta_mem.warmup import launch

SIZES, HIDDEN, PROJECTIONS = (32, 16, 16), 24, 26
WIDTH = sum(SIZES)


class Plain:
    def apply(self, layer, x, bias):
        return nn.functional.linear(x, layer.weight, bias)


class Quantised(Plain):
    pass


class Linear(nn.Module):
    """What both engines' fused projections have."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False) if bias else None
        self.quant_method, self.gather_output, self.skip_bias_add = Plain(), False, False


class WithLoRA(Linear):
    pass


@pytest.fixture
def memory():
    return SimpleNamespace(sizes=SIZES, down=torch.randn(PROJECTIONS, HIDDEN))


@pytest.mark.parametrize("bias", [True, False])
def test_one_matmul_gives_what_two_give_and_updated_weights_reach_it(memory, bias):
    base, x = Linear(bias), torch.randn(5, HIDDEN)
    folded = fold(base, memory, Linear, Plain)
    for _ in range(2):
        out = folded(x)
        assert out.shape[1] % ALIGNMENT == 0
        torch.testing.assert_close(out[:, :WIDTH], base.quant_method.apply(base, x, base.bias))
        torch.testing.assert_close(out[:, WIDTH : WIDTH + PROJECTIONS], x @ memory.down.T)
        assert not out[:, WIDTH + PROJECTIONS :].any()
        for parameter in base.parameters():  # as the engines' loaders do
            parameter.data.copy_(torch.randn_like(parameter))
    assert base.weight.shape == (WIDTH, HIDDEN), "a loader checks it"


@pytest.mark.parametrize(
    "change",
    [
        lambda base: setattr(base, "quant_method", Quantised()),
        lambda base: setattr(base, "gather_output", True),
        lambda base: setattr(base, "skip_bias_add", True),
        lambda base: setattr(base, "weight", nn.Parameter(torch.randn(WIDTH // 2, HIDDEN))),  # packed
        lambda base: setattr(base, "__class__", WithLoRA),
    ],
)
def test_what_is_no_plain_matrix_is_left_alone(memory, change):
    base = Linear(True)
    change(base)
    before = base.weight
    assert fold(base, memory, Linear, Plain) is None
    assert base.weight is before


def test_a_warm_up_has_the_strides_of_the_real_thing(memory):
    out = fold(Linear(False), memory, Linear, Plain)(torch.randn(3, HIDDEN))
    made = []
    spec = SimpleNamespace(read_width=4, bias_width=2, projection_width=PROJECTIONS)
    launch(spec, 3, torch.float32, torch.device("cpu"), None, lambda *tensors: made.append(tensors[:2]), WIDTH)
    (qkv, projections), (alone, apart) = made
    assert qkv.stride() == projections.stride() == out.stride()
    assert projections.storage_offset() == WIDTH and projections.shape == apart.shape == (3, PROJECTIONS)
    assert alone.shape == qkv.shape and alone.is_contiguous() and apart.is_contiguous()
