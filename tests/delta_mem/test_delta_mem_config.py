"""The adapter's configuration: defaults, archived and unknown keys (A14), scales, and what depends on it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from mem_triton.config import ConfigError
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.systems.delta_mem import AttentionDims, DeltaMemConfig, pack_layer, tensor_shapes
from mem_triton.systems.delta_mem.config import ARCHIVED_KEYS

OTHER_VALUES = {int: 7, float: 0.123, str: "other", bool: None, list: [1]}


def test_round_trip_through_json() -> None:
    config = DeltaMemConfig(
        rank=4, alpha=6.0, delta_heads=("o", "q"), num_state_heads=4, target_layers=(1, 2), couple_lambda=False
    )
    assert DeltaMemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.spec == DeltaRuleSpec(rank=4, heads=4, couple_lambda=False)


@pytest.mark.parametrize("key", ARCHIVED_KEYS)
def test_a14_archived_keys_hold_one_value(key: str) -> None:
    accepted = ARCHIVED_KEYS[key]
    assert DeltaMemConfig.from_dict({key: accepted}) == DeltaMemConfig()
    other = (not accepted) if isinstance(accepted, bool) else OTHER_VALUES[type(accepted)]
    with pytest.raises(ConfigError) as error:
        DeltaMemConfig.from_dict({key: other})
    assert key in str(error.value) and repr(other) in str(error.value) and repr(accepted) in str(error.value)


def test_a14_archived_values_are_compared_by_type_too() -> None:
    assert DeltaMemConfig.from_dict({"memory_reader_layers": (), "memory_partition_routing": " Soft"})
    for key, value in (("num_memory_partitions", True), ("memory_reader_read_only", 1), ("latent_memory_layers", 0)):
        with pytest.raises(ConfigError, match=key):
            DeltaMemConfig.from_dict({key: value})


@pytest.mark.parametrize(
    ("bad", "nearest"),
    [("delta_head", "delta_heads"), ("ranks", "rank"), ("memory_readout", "memory_readout_mode"), ("beta", "")],
)
def test_a14_unknown_key_names_the_nearest(bad: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{bad}'.*{nearest}"):
        DeltaMemConfig.from_dict({bad: 1})


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("state_update_mode", "fast", "lambda_outside"),
        ("memory_write_granularity", "message_proposals", "message_mean"),
        ("delta_heads", ["q", "x"], "'k'"),
        ("delta_scale_granularity", "global", "layer"),
        ("delta_scale_parameterization", "free", "alpha_over_rank"),
        ("output_init", "ones", "base_slice"),
        ("rank", 0, "greater than or equal to 1"),
        ("num_state_heads", 0, "greater than or equal to 1"),
        ("delta_o_rmsnorm_eps", 0.0, "greater than 0"),
        ("delta_scale_init", 2.0, "smaller than delta_scale_max"),
        ("rank", "eight", "integer"),
    ],
)
def test_a14_bad_values_are_refused_with_what_is_accepted(key: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError) as error:
        DeltaMemConfig.from_dict({key: value})
    assert key in str(error.value) and accepted in str(error.value)


@pytest.mark.parametrize(
    ("given", "heads"), [("q,o", "qo"), (["Q", " o ", "q"], "qo"), ("none", ""), ([], ""), ("qk"[:1], "q")]
)
def test_delta_heads_as_the_official_config_reads_them(given: object, heads: str) -> None:
    assert DeltaMemConfig.from_dict({"delta_heads": given}).delta_heads == tuple(heads)


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DeltaMemConfig().rank = 4


def test_scales() -> None:
    assert DeltaMemConfig(rank=4, alpha=6.0).scales() == dict.fromkeys("qkvo", 1.5)
    assert DeltaMemConfig(num_state_heads=4).scales()["q"] == 2.0  # alpha / rank, not divided by H
    layer = DeltaMemConfig(trainable_delta_scale=True, delta_scale_max=3.0)
    assert layer.scales(torch.tensor([0.5]))["k"] == pytest.approx(2.0 * 3.0 / (1 + math.exp(-0.5)))
    head = layer.model_copy(update={"delta_scale_granularity": "head"})
    raw = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert [head.scales(raw)[h] for h in "qkvo"] == pytest.approx([6 / (1 + math.exp(-x)) for x in raw.tolist()])
    fresh = torch.tensor([layer.initial_scale_raw])
    assert layer.scales(fresh)["o"] == pytest.approx(2.0 * layer.delta_scale_init)
    with pytest.raises(ValueError, match="delta_scale_raw must have 4"):
        head.scales(torch.zeros(1))


def test_targets() -> None:
    config = DeltaMemConfig(target_layers=(1, 11))
    names = [f"model.layers.{i}.self_attn" for i in (0, 1, 10, 11)] + ["model.layers.1.mlp"]
    assert [config.targets(name) for name in names] == [False, True, False, True, False]
    assert DeltaMemConfig().targets("model.layers.5.self_attn")


def test_packed_layer_folds_the_scale_and_drops_inactive_heads() -> None:
    dims = AttentionDims(hidden=6, q=8, k=4, v=4, o=6)
    config = DeltaMemConfig(rank=2, num_state_heads=3, delta_heads="o,k", couple_lambda=False, alpha=5.0)
    tensors = {key: torch.randn(shape) for key, shape in tensor_shapes(config, dims).items()}
    packed = pack_layer(config, tensors)
    assert packed.down.shape == (config.spec.projection_width, 6) and packed.gate_bias.shape == (12,)
    order = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "lambda_proj"]
    assert torch.equal(packed.down, torch.cat([tensors[key] for key in order]))
    assert packed.delta_q is None and packed.delta_v is None
    assert torch.equal(packed.delta_k, 2.5 * tensors["delta_k_proj"])
    small = packed.to("cpu", torch.bfloat16)
    assert (small.down.dtype, small.gate_bias.dtype) == (torch.bfloat16, torch.float32)


def test_import_brings_in_no_engine() -> None:
    code = (
        "import sys, mem_triton, mem_triton.systems.delta_mem\n"
        "print([name for name in ('transformers', 'vllm', 'sglang') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
