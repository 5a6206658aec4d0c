"""What a model's ``config.json`` says about its rotary position embedding, layer by layer.

RoPE (arXiv 2104.09864, section 3.2), position interpolation, Llama-3's scaling by wavelength, and YaRN
(arXiv 2309.00071, section 3). Types whose angles depend on the length of the sequence are refused: a key of theirs
cannot be moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.reposition.given import UnsupportedRopeError, given_frequencies

INTERLEAVED = frozenset(
    {"codegen", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4_text"}
)
"""Model types that pair channel 2i with 2i + 1; no field of their config says so."""
ROPE_IN_SLIDING_LAYERS_ONLY = frozenset({"cohere2", "exaone4"})


@dataclass(frozen=True)
class RotaryEmbedding:
    """How one layer turns queries and keys: channel pair i by ``position * inv_freq[i]`` radians.

    rotary_dim: leading channels of a head that turn; 0 = none do (a NoPE layer), so a key is the same everywhere.
    inv_freq: rotary_dim / 2 angles per position, fp64, computed unless the config lists them. attention_factor: YaRN's
    factor on the turned channels. interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
    """

    rotary_dim: int
    inv_freq: tuple[float, ...] = ()
    attention_factor: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if len(self.inv_freq) * 2 != self.rotary_dim:
            raise ValueError(f"inv_freq: {len(self.inv_freq)} angles for rotary_dim={self.rotary_dim}, expected half")


def rope_from_config(config: Mapping[str, Any], layer_index: int | None = None) -> RotaryEmbedding:
    """Make the rotary embedding that a Hugging Face ``config.json`` gives to a layer.

    config: the parsed file (or ``PreTrainedConfig.to_dict()``), with ``rope_parameters`` (transformers 5) or
    ``rope_theta`` and ``rope_scaling``. layer_index: needed where layers differ (NoPE layers, one RoPE per layer type).

    Raises UnsupportedRopeError, which names the field, for dynamic NTK, longrope, mrope and anything unknown. Example::

        rope = rope_from_config(json.loads(Path("model/config.json").read_text()), layer_index=0)
    """
    config = config.get("text_config") or config
    if config.get("qk_rope_head_dim"):
        raise UnsupportedRopeError("qk_rope_head_dim: latent attention shares one rotated key among all heads")
    if not _turns(config, layer_index):
        return RotaryEmbedding(0)
    fields = _fields(config, layer_index)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if fields.get("mrope_section") or kind == "mrope":
        raise UnsupportedRopeError("rope_parameters.mrope_section: a token with several positions cannot be moved")
    if kind not in FREQUENCIES:
        why = "its angles depend on the sequence's length" if kind in ("dynamic", "longrope", "su") else "it is unknown"
        raise UnsupportedRopeError(
            f"rope_parameters.rope_type: keys of {kind!r} cannot be moved, {why}; supported: {', '.join(FREQUENCIES)}"
        )
    head_dim = config.get("head_dim") or _need(config, "hidden_size") // _need(config, "num_attention_heads")
    rotary_dim = int(head_dim * float(fields.get("partial_rotary_factor") or 1.0))
    base = fields["rope_theta"] ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    inv_freq, attention_factor = FREQUENCIES[kind](base, fields, config)
    frequencies = given_frequencies(config, len(base)) or tuple(inv_freq.tolist())
    return RotaryEmbedding(rotary_dim, frequencies, attention_factor, config.get("model_type") in INTERLEAVED)


def _turns(config: Mapping[str, Any], layer_index: int | None) -> bool:
    """Whether the layer has a rotary embedding at all."""
    flags, types = config.get("no_rope_layers"), config.get("layer_types") or ()
    if not flags and config.get("no_rope_layer_interval"):
        interval = config["no_rope_layer_interval"]
        flags = [(i + 1) % interval for i in range(_need(config, "num_hidden_layers"))]
    field = "no_rope_layers"
    if config.get("model_type") in ROPE_IN_SLIDING_LAYERS_ONLY and config.get("sliding_window") and types:
        flags, field = [kind == "sliding_attention" for kind in types], "layer_types"
    if not flags:
        return True
    if layer_index is None:
        if len({bool(flag) for flag in flags}) > 1:
            raise UnsupportedRopeError(f"layer_index: needed, {field} says that some layers have no RoPE")
        return bool(flags[0])
    return bool(flags[layer_index])


def _fields(config: Mapping[str, Any], layer_index: int | None) -> dict[str, Any]:
    """The layer's rope fields, wherever this generation of config files keeps them; always with ``rope_theta``."""
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    types, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    kind = types[layer_index] if types and layer_index is not None else None
    if not types and pattern and layer_index is not None:  # Gemma 3 before transformers 5
        kind = "sliding_attention" if (layer_index + 1) % pattern else "full_attention"
    if any(isinstance(value, Mapping) for value in fields.values()) or config.get("rope_local_base_freq"):
        if kind is None:
            missing = "layer_index: needed" if types or pattern else "layer_types: missing"
            raise UnsupportedRopeError(f"{missing}, layer types have different rope_parameters")
        if kind in fields:
            fields = fields[kind] or {}
        elif kind == "sliding_attention" and config.get("rope_local_base_freq"):
            fields = {"rope_theta": config["rope_local_base_freq"]}
        elif any(isinstance(value, Mapping) for value in fields.values()):
            raise UnsupportedRopeError(f"rope_parameters.{kind}: missing, layer {layer_index} is of this type")
    theta = fields.get("rope_theta") or config.get("rope_theta")
    if theta is None and config.get("model_type") == "llama":
        theta = 10000.0  # the first Llama configs leave it out
    if theta is None:
        raise UnsupportedRopeError("rope_parameters.rope_theta: missing; models without RoPE are not supported")
    partial = fields.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return {**fields, "rope_theta": float(theta), "partial_rotary_factor": partial}


def _need(fields: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    if fields.get(name) is None:
        raise UnsupportedRopeError(f"{prefix}{name}: missing")
    return fields[name]


def _trained_length(fields: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    name = "original_max_position_embeddings"
    return float(config.get(name) or fields.get(name) or _need(config, "max_position_embeddings"))


def _default(base: Tensor, fields: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, float]:
    return base, 1.0


def _linear(base: Tensor, fields: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, float]:
    return base / float(_need(fields, "factor", "rope_parameters.")), 1.0


def _llama3(base: Tensor, fields: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Slow channels are stretched by ``factor``, fast ones kept, those between blended."""
    factor, low, high = (
        float(_need(fields, name, "rope_parameters.")) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = _trained_length(fields, config) * base / (2 * math.pi)  # full turns over the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * base + (1 - kept) * base / factor, 1.0


def _yarn(base: Tensor, fields: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, float]:
    """As llama3, blended linearly over the channel's index; and the logits get a temperature."""
    length, dim = _trained_length(fields, config), 2 * len(base)
    factor = float(fields.get("factor") or _need(config, "max_position_embeddings") / length)

    def channel_of(turns: float) -> float:  # the (real-valued) pair that turns so often over the trained length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(fields["rope_theta"]))

    first, last = channel_of(fields.get("beta_fast") or 32), channel_of(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    stretched = ((torch.arange(len(base), dtype=torch.float64) - first) / width).clamp(0, 1)
    return (1 - stretched) * base + stretched * base / factor, _temperature(fields, factor)


def _temperature(fields: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on the turned channels of query and key alike."""
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return grown(float(fields["mscale"])) / grown(float(fields["mscale_all_dim"]))
    return grown(1.0)


FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
