"""``rope_from_config``, ``rotate`` and ``unrotate`` against transformers' own rotary modules, and RoPE's own law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CohereConfig, Gemma3TextConfig, GlmConfig, LlamaConfig, Qwen3Config, SmolLM3Config
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_interleaved
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_partly
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_halves
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from mem_triton.ops.reposition import (
    RotaryEmbedding,
    UnsupportedRopeError,
    angles,
    move,
    rope_from_config,
    rotate,
    unrotate,
)

SIZE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
MODELS = {
    "qwen3": (Qwen3Config, Qwen3RotaryEmbedding, apply_halves, {"rope_theta": 1e6, "rope_type": "default"}),
    "llama3": (LlamaConfig, LlamaRotaryEmbedding, apply_halves, LLAMA3),
    "linear": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        apply_halves,
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    ),
    "yarn": (Qwen3Config, Qwen3RotaryEmbedding, apply_halves, YARN),
    "yarn_betas": (
        Qwen3Config,
        Qwen3RotaryEmbedding,
        apply_halves,
        {**YARN, "beta_fast": 64, "beta_slow": 2, "truncate": False, "factor": 16.0},
    ),
    "yarn_attention_factor": (Qwen3Config, Qwen3RotaryEmbedding, apply_halves, {**YARN, "attention_factor": 1.3}),
    "yarn_mscale": (Qwen3Config, Qwen3RotaryEmbedding, apply_halves, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "partial_interleaved": (
        GlmConfig,
        GlmRotaryEmbedding,
        apply_partly,
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "interleaved": (
        CohereConfig,
        CohereRotaryEmbedding,
        apply_interleaved,
        {"rope_type": "default", "rope_theta": 1e4},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("generation", ["rope_parameters", "rope_scaling"])
def test_equals_transformers(name, generation):
    """The same inverse frequencies and turned keys; from today's config files and from those before transformers 5."""
    config_type, module_type, apply, fields = MODELS[name]
    config = config_type(**SIZE, rope_parameters=dict(fields), max_position_embeddings=131072)
    described = config.to_dict()
    if generation == "rope_scaling":
        described.pop("rope_parameters")
        old = dict(fields)
        described["rope_theta"] = old.pop("rope_theta")
        if "partial_rotary_factor" in old:
            described["partial_rotary_factor"] = old.pop("partial_rotary_factor")
        old["type"] = old.pop("rope_type")
        described["rope_scaling"] = old if old["type"] != "default" else None
    rope, module = rope_from_config(described, layer_index=1), module_type(config)
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64)
    torch.testing.assert_close(inv_freq, module.inv_freq.double(), rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)

    head_dim = described.get("head_dim") or 64
    g = torch.Generator().manual_seed(0)
    keys, positions = torch.randn(1, 2, 50, head_dim, generator=g), torch.arange(50)[None]
    with torch.no_grad():
        _, want = apply(keys, keys, *module(keys, positions))
    torch.testing.assert_close(rotate(keys, positions[:, None], rope), want, rtol=0, atol=5e-5)
    torch.testing.assert_close(unrotate(want, positions[:, None], rope), keys, rtol=0, atol=5e-5)


def test_layer_types_have_their_own_rope():
    config = Gemma3TextConfig(**SIZE, head_dim=64, layer_types=["sliding_attention", "full_attention"] * 2)
    module = Gemma3RotaryEmbedding(config)
    for layer, kind in enumerate(config.layer_types):
        rope = rope_from_config(config.to_dict(), layer)
        want = getattr(module, f"{kind}_inv_freq").double()
        torch.testing.assert_close(torch.tensor(rope.inv_freq, dtype=torch.float64), want, rtol=1e-6, atol=0)
    assert rope_from_config(config.to_dict(), 0) != rope_from_config(config.to_dict(), 1)
    with pytest.raises(UnsupportedRopeError, match=r"^layer_index: needed"):
        rope_from_config(config.to_dict())
    want = [rope_from_config(config.to_dict(), layer) for layer in range(4)]
    old = {**config.to_dict(), "rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert [rope_from_config(old, layer) for layer in range(4)] == want
    old.update(layer_types=None, sliding_window_pattern=2)  # as the first Gemma 3 files have it
    assert [rope_from_config(old, layer) for layer in range(4)] == want
    with pytest.raises(UnsupportedRopeError, match=r"^layer_types: missing"):
        rope_from_config({**old, "sliding_window_pattern": None}, 0)


def test_a_nope_layer_turns_nothing():
    config = SmolLM3Config(**SIZE, no_rope_layers=[1, 1, 1, 0]).to_dict()
    assert rope_from_config(config, 3) == RotaryEmbedding(0)
    assert rope_from_config(config, 2).rotary_dim == 64
    keys = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    for turn in (rotate, unrotate):
        assert torch.equal(turn(keys, torch.arange(5), RotaryEmbedding(0)), keys)
    with pytest.raises(UnsupportedRopeError, match=r"^layer_index: needed, no_rope_layers"):
        rope_from_config(config)
    config.update(no_rope_layers=None, no_rope_layer_interval=4)
    assert [rope_from_config(config, layer).rotary_dim for layer in range(4)] == [64, 64, 64, 0]
    cohere2 = {**CohereConfig(**SIZE).to_dict(), "model_type": "cohere2", "sliding_window": 64}
    cohere2["layer_types"] = ["sliding_attention", "full_attention"] * 2
    assert [rope_from_config(cohere2, layer).rotary_dim for layer in range(4)] == [64, 0, 64, 0]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: .*'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type: .*'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}, "rope_theta": 1e4}, "rope_type: .*'su'"),
        ({"rope_parameters": {"rope_type": "new", "rope_theta": 1e4}}, "rope_type: .*'new' .*unknown"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12]}}, "mrope_section"),
        ({"rope_parameters": None, "rope_scaling": {"type": "mrope"}, "rope_theta": 1e4}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"^rope_parameters\.factor: missing"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, r"^rope_parameters\.low_freq_factor: missing"),
        ({"rope_parameters": None, "rope_theta": None}, r"^rope_parameters\.rope_theta: missing"),
        ({"qk_rope_head_dim": 64}, "^qk_rope_head_dim"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}, "layer_types": ["full_attention"] * 4},
            r"^rope_parameters\.full_attention: missing",
        ),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(change, message):
    config = {**Qwen3Config(**SIZE).to_dict(), **change}
    with pytest.raises(UnsupportedRopeError, match=message):
        rope_from_config(config, 0)


def test_the_text_part_of_a_larger_model_counts():
    text = Qwen3Config(**SIZE).to_dict()
    assert rope_from_config({"model_type": "some_vl", "text_config": text}) == rope_from_config(text)


ROPES = [
    rope_from_config(MODELS[name][0](**SIZE, rope_parameters=dict(MODELS[name][3])).to_dict(), 0) for name in MODELS
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rope=st.sampled_from(ROPES),
    places=st.lists(st.integers(-5000, 5000), min_size=2, max_size=6),
    shift=st.integers(-100000, 100000),
)
def test_logits_depend_on_differences_of_positions_only(rope, places, shift):
    """Negative positions included: that is what lets memory lie before a context that starts at 0."""
    g = torch.Generator().manual_seed(len(places))
    q, k = torch.randn(2, len(places), 128, generator=g, dtype=torch.float64)
    here, there = torch.tensor(places), torch.tensor(places) + shift
    logits = rotate(q, here, rope) @ rotate(k, here, rope).T
    torch.testing.assert_close(rotate(q, there, rope) @ rotate(k, there, rope).T, logits, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        rotate(q, there, rope) @ move(rotate(k, here, rope), here, there, rope).T, logits, rtol=0, atol=1e-8
    )
    torch.testing.assert_close(unrotate(rotate(k, there, rope), there, rope), k, rtol=0, atol=1e-12)
    if rope.rotary_dim and shift:  # negative control: a shift of the keys alone changes the logits
        assert (rotate(q, here, rope) @ rotate(k, here + 1, rope).T - logits).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keys_are_turned_in_fp32_and_rounded_once(dtype):
    g = torch.Generator().manual_seed(0)
    keys, positions = torch.randn(3, 40, 128, generator=g).to(dtype), torch.arange(-128, -88)
    rope = ROPES[0]
    turned = rotate(keys, positions, rope)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(keys.float(), positions, rope).to(dtype))


def test_wrong_arguments_are_named():
    rope = ROPES[0]
    with pytest.raises(TypeError, match=r"^positions: torch.float32"):
        rotate(torch.zeros(2, 128), torch.zeros(2), rope)
    with pytest.raises(ValueError, match=r"^x: 16 channels, the rotary embedding turns"):
        rotate(torch.zeros(2, 16), torch.zeros(2, dtype=torch.int32), rope)
    with pytest.raises(ValueError, match=r"^inv_freq: 3 angles for rotary_dim=8"):
        RotaryEmbedding(8, (1.0, 2.0, 3.0))


def test_many_places_of_a_short_span_get_the_angles_of_each_alone():
    rope = rope_from_config({"model_type": "llama", "head_dim": 16, "rope_theta": 10000.0})
    positions = torch.randint(-1000, -950, (3, 200), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    cos, sin = angles(positions, rope, torch.float32)
    alone = [angles(position, rope, torch.float32) for position in positions.flatten()]
    assert torch.equal(cos.flatten(0, 1), torch.stack([a for a, _ in alone]))
    assert torch.equal(sin.flatten(0, 1), torch.stack([b for _, b in alone]))
