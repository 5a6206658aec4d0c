"""Which model a bank belongs to: its shape, its RoPE, its dtype and its weights, read off its folder in a moment."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mem_triton.ops.reposition.given import GIVEN
from mem_triton.store.errors import FingerprintError
from mem_triton.store.files import SINGLE, indexed_files, kind_of, read_object

SAMPLES = 4
SAMPLE_BYTES = 256
ROPE_DEFAULTS: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 1.0}


MODEL_FILES = ("*.json", "*.safetensors")
TOKENIZER_FILES = ("*.jinja", "*.model", "*.txt")


def model_folder(model: str, revision: str | None = None, tokenizer: bool = False, download: bool = True) -> Path:
    """The model's own files: a local folder, or the Hugging Face cache's, downloaded if need be.

    tokenizer: with its tokenizer's. download: False takes what is in the cache. Raises what
    ``huggingface_hub.snapshot_download`` raises.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, *(TOKENIZER_FILES if tokenizer else ())]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=not download))


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
    where = f"{folder}/config.json"
    config = read_object(folder / "config.json", "give a model folder as transformers saves it", FingerprintError)
    text = config.get("text_config") or config  # models that also see or hear keep their language part here
    if not isinstance(text, dict):
        raise FingerprintError(f"{where}: text_config holds {kind_of(text)}, expected an object")
    names = config.get("architectures") or text.get("architectures") or [config.get("model_type")]
    if not isinstance(names, list) or not isinstance(names[0], (str, type(None))):
        raise FingerprintError(f"{where}: architectures is {_short(names)}, expected a list of names")

    def need(key: str, default: int | None = None) -> int:
        value = text.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise FingerprintError(f"{where}: {key} is {_short(value)}, expected a whole number above 0")
        return value

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    kv_heads = need("num_key_value_heads", heads)
    if heads % kv_heads:
        raise FingerprintError(f"{where}: num_key_value_heads is {kv_heads}, which does not divide {heads} heads")
    head_dim = need("head_dim", hidden // heads)
    num_layers = need("num_hidden_layers")
    try:
        rope = rope_settings(text)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FingerprintError(f"{where}: its RoPE settings cannot be read: {error}") from None
    weights, stored_dtype = _weights(folder)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or stored_dtype
    if not isinstance(dtype, str):
        raise FingerprintError(f"{where}: dtype is {_short(dtype)}, expected a name like bfloat16")
    return Fingerprint(
        architecture=str(names[0]),
        num_layers=num_layers,
        hidden_size=hidden,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        dtype=dtype,
        weights=weights,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


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


def rope_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE in one form for configs of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{_short(found)} is no object")
    found = dict(found)
    if "type" in found:
        found.setdefault("rope_type", found["type"])
        del found["type"]
    if not any(isinstance(value, Mapping) for value in found.values()):  # else one set for each type of layer
        found.setdefault("rope_theta", text.get("rope_theta", 10000.0))
        if "partial_rotary_factor" in text:
            found.setdefault("partial_rotary_factor", text["partial_rotary_factor"])
        for name in ("rope_theta", "partial_rotary_factor"):
            value = 1.0 if found.get(name) is None else found[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {_short(value)}, expected a number above 0")
    for name in ("no_rope_layers", GIVEN):
        if text.get(name):
            found[name] = text[name]
    return {key: _plain(found[key]) for key in sorted(found) if found[key] != ROPE_DEFAULTS.get(key, ...)}


def _plain(value: Any) -> Any:
    """Numbers as floats, so that 1000000 and 1000000.0 are one."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _weights(folder: Path) -> tuple[str, str]:
    """(hash of the tensors, the dtype of most of their bytes)."""
    indexed = indexed_files(folder, "fetch or save the model again", FingerprintError)
    try:
        if indexed is not None:
            files = [folder / name for name in sorted(set(indexed.values()))]
        else:
            files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise FingerprintError(f"{folder}: no *.safetensors; convert the model's weights to safetensors")
        tensors = dict(entry for path in files for entry in _tensors(path))
    except FingerprintError:
        raise
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise FingerprintError(f"{folder}: cannot read its weights: {error}") from None
    if not tensors:
        raise FingerprintError(f"{folder}: no *.safetensors with tensors; convert the model's weights to safetensors")
    digest, sizes = hashlib.sha256(), {}
    for name in sorted(tensors):
        dtype, shape, length, sample = tensors[name]
        digest.update(f"{name} {dtype} {shape} ".encode() + sample)
        sizes[dtype] = sizes.get(dtype, 0) + length
    most = max(sizes, key=sizes.__getitem__)
    return digest.hexdigest()[:32], {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(most, most)


def _tensors(path: Path) -> list[tuple[str, tuple[str, list[int], int, bytes]]]:
    """(name, (dtype, shape, bytes, hash of samples)) of each tensor of a safetensors file. Raises ValueError."""
    found = []
    with open(path, "rb") as file:
        room = path.stat().st_size - 8
        start = file.read(8)
        (header_bytes,) = struct.unpack("<Q", start) if len(start) == 8 else (room + 1,)
        if header_bytes > room:
            raise ValueError(f"{path.name} is no safetensors file, or is cut off")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path.name}: its header is {kind_of(header)}, expected an object")
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, first, end = _described(path.name, name, tensor, room - header_bytes)
            sample = hashlib.sha256()
            for offset in _offsets(end - first, SAMPLES, SAMPLE_BYTES):
                file.seek(8 + header_bytes + first + offset)
                sample.update(file.read(min(SAMPLE_BYTES, end - first - offset)))
            found.append((name, (dtype, shape, end - first, sample.digest())))
    return found


def _described(file: str, name: str, tensor: Any, room: int) -> tuple[str, list[int], int, int]:
    """(dtype, shape, first byte, last byte) of a header's tensor. room: bytes of all. Raises ValueError."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 60 for v in values)

    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str) or not whole(tensor.get("shape")):
        raise ValueError(f"{file}: the header's entry of {_short(name)} has no dtype and shape")
    offsets = tensor.get("data_offsets")
    if not whole(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise ValueError(f"{file}: data_offsets of {_short(name)} are {_short(offsets)}, the file has {room} bytes")
    return tensor["dtype"], tensor["shape"], *offsets
