"""Which model a bank belongs to: its shape, its RoPE, its dtype and its weights, read off its folder in a moment."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mem_triton.store.errors import FingerprintError

SAMPLES = 4
SAMPLE_BYTES = 256
ROPE_DEFAULTS: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 1.0}


class Fingerprint(BaseModel):
    """What a key and a value depend on besides their text. rope: type, base and scaling; weights: hash of the tensors.

    The hash covers each tensor's name, dtype and shape and a few samples of its bytes, whatever files they lie in, so a
    model split into other shards keeps its fingerprint and a fine-tuned one does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    num_layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rope: dict[str, Any]
    dtype: str
    weights: str

    def differences(self, other: Fingerprint) -> list[str]:
        """One "field: bank has X, model has Y" for each field in which ``other``, a model, differs from this bank's."""
        return [
            f"{name}: bank has {getattr(self, name)}, model has {getattr(other, name)}"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]


def model_fingerprint(folder: str | Path) -> Fingerprint:
    """Fingerprint of a model folder with ``config.json`` and safetensors; about a second for 10 GB.

    Raises FingerprintError naming the file or key that is missing or unreadable.

    Example::

        if differences := bank.spec.fingerprint.differences(model_fingerprint("models/qwen3-4b")):
            raise SystemExit("; ".join(differences))
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise FingerprintError(f"{folder}/config.json: {error}; give a model folder as transformers saves it") from None
    text = config.get("text_config") or config  # models that also see or hear keep their language part here
    architecture = (config.get("architectures") or text.get("architectures") or [config.get("model_type")])[0]

    def need(key: str) -> int:
        if not isinstance(text.get(key), int):
            raise FingerprintError(f"{folder}/config.json: {key} is {text.get(key)!r}, expected a whole number")
        return text[key]

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    weights, stored_dtype = _weights(folder)
    return Fingerprint(
        architecture=str(architecture),
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden,
        query_heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        rope=_rope(text),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or stored_dtype),
        weights=weights,
    )


def sampled_digest(path: Path, samples: int = 64, size: int = 4096) -> str:
    """Hash of a file's length and of evenly spaced samples of it: says in a moment whether it is another file."""
    length = path.stat().st_size
    digest = hashlib.sha256(struct.pack("<Q", length))
    with open(path, "rb") as file:
        for offset in _offsets(length, samples, size):
            file.seek(offset)
            digest.update(file.read(size))
    return digest.hexdigest()


def _offsets(length: int, samples: int, size: int) -> list[int]:
    last = max(length - size, 0)
    return sorted({last * i // max(samples - 1, 1) for i in range(samples)})


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE in one form for configs of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    found = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "type" in found:
        found.setdefault("rope_type", found["type"])
        del found["type"]
    if not any(isinstance(value, Mapping) for value in found.values()):  # else one set for each type of layer
        found.setdefault("rope_theta", text.get("rope_theta", 10000.0))
        if "partial_rotary_factor" in text:
            found.setdefault("partial_rotary_factor", text["partial_rotary_factor"])
    if text.get("no_rope_layers"):
        found["no_rope_layers"] = text["no_rope_layers"]
    return {key: _plain(found[key]) for key in sorted(found) if found[key] != ROPE_DEFAULTS.get(key, ...)}


def _plain(value: Any) -> Any:
    """Numbers as floats, so that 1000000 and 1000000.0 are one."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _weights(folder: Path) -> tuple[str, str]:
    """(hash of the tensors, the dtype of most of their bytes)."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            single = folder / "model.safetensors"
            files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise FingerprintError(f"{folder}: no *.safetensors; convert the model's weights to safetensors")
        tensors = dict(entry for path in files for entry in _tensors(path))
    except (OSError, KeyError, ValueError, struct.error) as error:
        if isinstance(error, FingerprintError):
            raise
        raise FingerprintError(f"{folder}: cannot read its weights: {type(error).__name__}: {error}") from None
    digest, sizes = hashlib.sha256(), {}
    for name in sorted(tensors):
        dtype, shape, length, sample = tensors[name]
        digest.update(f"{name} {dtype} {shape} ".encode() + sample)
        sizes[dtype] = sizes.get(dtype, 0) + length
    most = max(sizes, key=sizes.__getitem__)
    return digest.hexdigest()[:32], {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(most, most)


def _tensors(path: Path) -> list[tuple[str, tuple[str, list[int], int, bytes]]]:
    """(name, (dtype, shape, bytes, hash of samples)) of each tensor of a safetensors file."""
    found = []
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(header_bytes))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            first, end = tensor["data_offsets"]
            sample = hashlib.sha256()
            for offset in _offsets(end - first, SAMPLES, SAMPLE_BYTES):
                file.seek(8 + header_bytes + first + offset)
                sample.update(file.read(min(SAMPLE_BYTES, end - first - offset)))
            found.append((name, (tensor["dtype"], tensor["shape"], end - first, sample.digest())))
    return found
