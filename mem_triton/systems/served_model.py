"""Compares the model that an engine really computes with the folder that it serves.

An engine's options change what a folder says: RoPE, sizes and the like (vLLM's ``--hf-overrides``, SGLang's
``--json-model-override-args``), and the precision of the weights (``--quantization``). Keys and values that were
written with the folder, and states of sessions, belong to one of them.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mem_triton.ops.reposition import UnsupportedRopeError, rope_from_config
from mem_triton.schema import ConfigError
from mem_triton.store.bank.fingerprint import model_fingerprint, model_folder, rope_settings
from mem_triton.systems.engine import EngineShape

FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "norm_topk_prob",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "hidden_act",
    "hidden_activation",
    "attention_bias",
    "mlp_bias",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
)
"""What keys and values depend on in a config besides RoPE. Windows and types of layers are not among them: engines
rewrite them, and have options of their own for them."""

ROPE = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")

OVERRIDES = {"vLLM": "--hf-overrides", "SGLang": "--json-model-override-args"}


def served(shape: EngineShape) -> dict[str, str]:
    """How the engine computes the model, which sessions' states belong to. "weights": where their version is known.

    Takes about a second for 10 GB of weights.
    """
    found = {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rope": json.dumps(rope_of(shape.hf_config), sort_keys=True, default=str),
        "quantization": shape.quantization or "none",
    }
    try:
        found["weights"] = model_fingerprint(model_folder(shape.model, shape.revision, download=False)).weights
    except (OSError, ValueError) as error:  # GGUF, object stores, ...
        logging.getLogger(f"{shape.engine.lower()}.mem_triton").warning(
            "mem_triton.session_dir: sessions are not compared with the weights that they were told under: %s", error
        )
    return found


def check_served(shape: EngineShape, folder: Path, bank: Path) -> None:
    """Raises ConfigError if the engine computes other keys and values than the folder that the bank was written with.

    folder: the served model's files, whose fingerprint is the bank's.
    """
    differences = config_differences(shape, folder)
    if differences:
        option = OVERRIDES.get(shape.engine, "what overrides the model's config")
        raise ConfigError(
            f"mem_triton.memory.bank: {bank} was written with {folder}, and the engine computes something else "
            f"({'; '.join(differences)}); start it without {option} of these, or change {folder}/config.json and "
            "write the bank again"
        )
    quantised = folder_quantisation(folder)
    if shape.quantization is not None and quantised is None:
        raise ConfigError(
            f"mem_triton.memory.bank: the engine quantises the weights ({shape.quantization}), and {bank} was written "
            f"with {folder}, which is not quantised: their keys and values differ; start it without --quantization, or "
            "serve a folder of quantised weights and write the bank with that"
        )
    if shape.quantization is None and quantised is not None:
        raise ConfigError(
            f"mem_triton.memory.bank: {bank} was written with {folder}, whose weights are quantised ({quantised}), and "
            "the engine computes without quantisation: their keys and values differ; leave out what switches it off"
        )


def config_differences(shape: EngineShape, folder: Path) -> list[str]:
    """One "field: the folder has X, the engine Y" for each in which the engine's config differs from the folder's.

    The folder's config is read as engines read it, by transformers, which knows each architecture's defaults.
    """
    there, here = _config_of(folder, shape), shape.hf_config
    found = [
        f"{name}: the folder has {there[name]}, the engine {here[name]}"
        for name in FIELDS
        if there.get(name) is not None and here.get(name) is not None and there[name] != here[name]
    ]
    layers = min(int(config.get("num_hidden_layers") or 1) for config in (there, here))
    if any(there.get(name) for name in ROPE) and any(_turn_differently(there, here, layer) for layer in range(layers)):
        found.append(f"RoPE: the folder has {rope_of(there)}, the engine {rope_of(here)}")
    return found


def _turn_differently(there: Mapping[str, Any], here: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer's angles differ; its settings, as they are written, where the angles are not known."""
    try:
        return rope_from_config(there, layer) != rope_from_config(here, layer)
    except UnsupportedRopeError:
        return rope_of(there) != rope_of(here)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's RoPE settings in one form, and the lengths that scaled ones are computed from."""
    try:
        found = rope_settings(config)
    except (TypeError, ValueError, AttributeError, ArithmeticError):  # engines take more than is understood here
        found = {name: config[name] for name in ROPE if config.get(name)}
    if set(found) <= {"rope_theta", "partial_rotary_factor", "no_rope_layers"}:
        return found
    return found | {name: config[name] for name in LENGTHS if config.get(name)}


def _config_of(folder: Path, shape: EngineShape) -> Mapping[str, Any]:
    transformers = importlib.import_module("transformers")  # by name: engines bring it along, this package does not
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config().to_dict()
    except Exception as error:  # an architecture whose code is not transformers'
        logging.getLogger(f"{shape.engine.lower()}.mem_triton").warning(
            "%s/config.json is compared as it is written, transformers does not know the architecture: %s",
            folder,
            error,
        )
        config = _raw_config(folder)
        return config.get("text_config") or config


def folder_quantisation(folder: Path) -> str | None:
    """How the weights of a model's folder are quantised, None if they are not."""
    config = _raw_config(folder)
    for part in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(name):
                said = part[name]
                return str(said.get("quant_method") or name) if isinstance(said, dict) else name
    return "hf_quant_config.json" if (folder / "hf_quant_config.json").exists() else None


def _raw_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))  # its fingerprint was taken: it is sound
