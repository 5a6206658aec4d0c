"""Reads and writes adapters: ``delta_mem_config.json`` and ``delta_mem_adapter.pt`` or ``.safetensors``.

The folder is the one that the official code writes, for a finished adapter as for a trainer's ``checkpoint-<step>``.
``mem_triton.json`` may lie beside them: ``{"scope": "sessions"}`` says that the adapter was trained for requests that
name a session and would spoil others; without it an adapter is for all, as the paper's are.
Unlike the official loader, which keeps random numbers where a tensor is missing, every missing, extra or misshaped
tensor is an error.

Example::

    adapter = load_adapter("declare-lab/delta-mem_qwen3_4b-instruct")
    weights = adapter.layers_for({"model.layers.0.self_attn": AttentionDims(2560, 4096, 1024, 1024, 2560), ...})
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from mem_triton.schema import ConfigError, nearest_name_hint
from mem_triton.store.files import read_object
from mem_triton.systems.delta_mem.config import DeltaMemConfig
from mem_triton.systems.delta_mem.layer import AttentionDims, DeltaMemLayerWeights, pack_layer, tensor_shapes
from mem_triton.systems.delta_mem.section import Scope

CONFIG_FILE = "delta_mem_config.json"
SCOPE_FILE = "mem_triton.json"
TENSOR_FILES = {"safetensors": "delta_mem_adapter.safetensors", "pt": "delta_mem_adapter.pt"}


class AdapterError(ValueError):
    """An adapter that cannot be used; the message names the file or the tensor and says what was expected."""


@dataclass(frozen=True, eq=False)
class DeltaMemAdapter:
    """A checked adapter.

    layers: module name, e.g. ``model.layers.0.self_attn`` -> tensor name -> CPU tensor, in the stored dtype.
    fingerprint: sha256 over the config and all tensors, the same for both file formats; part of every cache key.
    scope: the requests that it is for.
    Raises AdapterError when a layer's tensors are missing, unknown, or of inconsistent shapes.
    """

    config: DeltaMemConfig
    layers: Mapping[str, Mapping[str, Tensor]]
    fingerprint: str = field(init=False)
    scope: Scope = "all"

    def __post_init__(self) -> None:
        if not self.layers:
            raise AdapterError("the adapter holds no tensors")
        for name, tensors in self.layers.items():
            self._check(name, tensors, _own_dims(name, tensors))
        object.__setattr__(self, "fingerprint", _fingerprint(self.config, self.tensors()))

    def tensors(self) -> dict[str, Tensor]:
        """Flat ``module.tensor`` -> tensor, as stored on disk, sorted by name."""
        flat = {f"{name}.{key}": t for name, tensors in self.layers.items() for key, t in tensors.items()}
        return dict(sorted(flat.items()))

    def layers_for(
        self, module_dims: Mapping[str, AttentionDims], *, complete: bool = True
    ) -> dict[str, DeltaMemLayerWeights]:
        """Packed weights for a model's attention modules, checked against their widths.

        module_dims: every attention module of the model, by name, with unsharded widths.
        complete: False for a pipeline stage, which holds only some of the model's layers.
        Returns the modules that the adapter corrects, in the order of ``module_dims``. Raises AdapterError naming the
        tensor if a targeted module has none, if the adapter holds others, or if a shape differs.
        """
        targeted = [name for name in module_dims if self.config.targets(name)]
        for name in targeted:
            if name not in self.layers:
                raise AdapterError(
                    f"tensor {name}.memory_q_proj is missing: the config targets this module of the model, "
                    f"but the adapter only holds {_some(self.layers)}"
                )
            self._check(name, self.layers[name], module_dims[name])
        extra = sorted(set(self.layers) - set(targeted))
        if complete and extra:
            why = "the config does not target it" if extra[0] in module_dims else f"it has {_some(module_dims)}"
            raise AdapterError(f"tensor {extra[0]}.memory_q_proj has no place in the model: {why}")
        return {name: pack_layer(self.config, self.layers[name]) for name in targeted}

    def _check(self, name: str, tensors: Mapping[str, Tensor], dims: AttentionDims) -> None:
        wanted = tensor_shapes(self.config, dims)
        for key in sorted(set(wanted) | set(tensors)):
            if key not in tensors:
                raise AdapterError(f"tensor {name}.{key} is missing, expected shape {wanted[key]}")
            if key not in wanted:
                raise AdapterError(
                    f"tensor {name}.{key} with shape {tuple(tensors[key].shape)} is not part of an adapter "
                    f"with this config; it has {', '.join(sorted(wanted))}"
                )
            if tuple(tensors[key].shape) != wanted[key]:
                raise AdapterError(
                    f"tensor {name}.{key} has shape {tuple(tensors[key].shape)}, expected {wanted[key]} "
                    f"(rank {self.config.rank}, {self.config.num_state_heads} state head(s), {dims})"
                )
            if not tensors[key].is_floating_point():
                raise AdapterError(f"tensor {name}.{key} has dtype {tensors[key].dtype}, expected a floating type")
            if tensors[key].layout is not torch.strided:
                raise AdapterError(f"tensor {name}.{key} has layout {tensors[key].layout}, expected a dense tensor")
            if not torch.isfinite(tensors[key].detach().float()).all():
                raise AdapterError(f"tensor {name}.{key} holds NaN or infinity: the adapter is damaged")


def load_adapter(
    path_or_id: str | os.PathLike[str], revision: str | None = None, scope: Scope | None = None
) -> DeltaMemAdapter:
    """Load an adapter from a folder or a Hugging Face id (``owner/name``); safetensors win where both files lie.

    revision: branch, tag or commit of a Hugging Face id. scope: the requests that it is for, None for what it says
    itself. Raises AdapterError or ConfigError.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
            raise AdapterError(f"{path_or_id} is neither a folder nor a Hugging Face id (owner/name)")
        try:
            folder = Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=_DOWNLOADS))
        except Exception as error:  # a dozen kinds, of several libraries
            raise AdapterError(f"{path_or_id} is no folder, and Hugging Face did not give it: {error}") from None
    elif revision is not None:
        raise AdapterError(f"revision={revision!r} only goes with a Hugging Face id, but {folder} is a folder")
    if not (folder / CONFIG_FILE).is_file():
        nested = sorted(path.parent for path in folder.glob(f"**/{CONFIG_FILE}"))
        hint = f"; did you mean {_some([str(path) for path in nested])}?" if nested else ""
        raise AdapterError(f"{folder} holds no {CONFIG_FILE}{hint}")
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} is not JSON: {error}") from None
    try:
        config = DeltaMemConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from None
    try:
        return adapter_from_tensors(config, _read_tensors(folder), scope or _read_scope(folder))
    except AdapterError as error:
        raise AdapterError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    except (RuntimeError, MemoryError, NotImplementedError) as error:  # tensors that are larger than their file
        raise AdapterError(f"{folder}: its tensors cannot be used: {error}") from None


def adapter_from_tensors(config: DeltaMemConfig, flat: Mapping[str, Tensor], scope: Scope = "all") -> DeltaMemAdapter:
    """Make an adapter of a flat ``module.tensor`` -> tensor mapping, e.g. a state dict."""
    layers: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in flat.items():
        name, dot, key = full_name.rpartition(".")
        if not dot:
            raise AdapterError(f"tensor {full_name} has no module in its name")
        layers.setdefault(name, {})[key] = tensor.detach().cpu()
    return DeltaMemAdapter(config, layers, scope)


def save_adapter(
    adapter: DeltaMemAdapter, folder: str | os.PathLike[str], format: Literal["pt", "safetensors"] = "safetensors"
) -> Path:
    """Write the two files, and the scope where it is not "all"; ``pt`` is what the official code reads. Returns the
    folder.

    Raises AdapterError if the folder already holds the other format, since a reader would then not know which is new.
    """
    if format not in TENSOR_FILES:
        raise AdapterError(f"format={format!r}: expected one of {', '.join(sorted(TENSOR_FILES))}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for other, file_name in TENSOR_FILES.items():
        if other != format and (folder / file_name).exists():
            raise AdapterError(f"{folder / file_name} is there already: remove it, or save with format={other!r}")
    tensors = {name: tensor.contiguous().clone() for name, tensor in adapter.tensors().items()}
    target = folder / TENSOR_FILES[format]
    partial = target.with_name(target.name + ".partial")  # a reader never sees half a file
    if format == "pt":
        torch.save(tensors, partial)
    else:
        safetensors.torch.save_file(tensors, partial, metadata={"fingerprint": adapter.fingerprint})
    partial.replace(target)
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    if adapter.scope != "all" or (folder / SCOPE_FILE).exists():
        (folder / SCOPE_FILE).write_text(json.dumps({"scope": adapter.scope}) + "\n", encoding="utf-8")
    return folder


_DOWNLOADS = [CONFIG_FILE, SCOPE_FILE, *TENSOR_FILES.values()]


def _read_scope(folder: Path) -> Scope:
    """What the adapter's ``mem_triton.json`` says, "all" without one."""
    path, fix = folder / SCOPE_FILE, 'write {"scope": "sessions"} or {"scope": "all"} into it, or remove it'
    if not path.exists():
        return "all"
    data = read_object(path, fix, AdapterError)
    if unknown := sorted(set(data) - {"scope"}):
        raise AdapterError(f"{path}: unknown key {unknown[0]!r:.80}.{nearest_name_hint(unknown[0], ['scope'])}")
    if (scope := data.get("scope", "all")) not in get_args(Scope):
        raise AdapterError(f'{path}: scope is {scope!r:.80}, expected "all" or "sessions"; {fix}')
    return scope


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSOR_FILES["safetensors"]).is_file():
        path = folder / TENSOR_FILES["safetensors"]
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # its own kind, KeyError for a type that torch does not have, and more
            raise AdapterError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    path = folder / TENSOR_FILES["pt"]
    if not path.is_file():
        raise AdapterError(f"{folder} holds neither {' nor '.join(TENSOR_FILES.values())}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except pickle.UnpicklingError as error:
        raise AdapterError(f"{path} holds more than tensors, and is not loaded for safety: {error}") from None
    except Exception as error:  # EOFError, KeyError, RuntimeError: whatever a damaged pickle or archive leads to
        raise AdapterError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, expected a flat dict of tensors")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise AdapterError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
    return data


def _own_dims(name: str, tensors: Mapping[str, Tensor]) -> AttentionDims:
    """Widths as the layer's own tensors imply them, to check that they agree with each other."""

    def size(key: str, axis: int) -> int:
        if key not in tensors:
            raise AdapterError(f"tensor {name}.{key} is missing; {name} only has {_some(tensors)}")
        if tensors[key].dim() != 2:
            raise AdapterError(f"tensor {name}.{key} has shape {tuple(tensors[key].shape)}, expected two dimensions")
        return tensors[key].shape[axis]

    return AttentionDims(size("memory_q_proj", 1), *(size(f"delta_{head}_proj", 0) for head in "qkvo"))


def _fingerprint(config: DeltaMemConfig, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(names: Mapping[str, object] | list[str]) -> str:
    """A few of the names, for an error message."""
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
