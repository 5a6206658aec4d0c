"""Reads what a LoRA adapter's files say of it, and whether they fit a model, without loading any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem_triton.schema import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Shapes = Mapping[str, tuple[int, ...]]
"""Tensors of safetensors files: name -> shape."""


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter's folder. base: the model that it was trained for, as its configuration has it, "" for unknown.

    rank: the greatest of its modules. modules: a weight's name in the model -> (out, in).
    """

    folder: Path
    base: str
    rank: int
    modules: Shapes


def read_adapter_files(folder: Path) -> AdapterFiles:
    """What an adapter's files say. Raises ConfigError naming the file that is missing, damaged or of another kind."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give a LoRA adapter's, with {CONFIG} and {WEIGHTS}")
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG}: cannot be read as an adapter's configuration: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG}: peft_type is not LORA; engines serve LoRA adapters alone")
    shapes = shapes_of(folder / WEIGHTS)
    ranks, modules = [], {}
    for name, shape in shapes.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            other = shapes.get(f"{module}.lora_B.weight")
            if len(shape) != 2 or other is None or len(other) != 2 or other[1] != shape[0]:
                raise ConfigError(f"{folder / WEIGHTS}: {module} has no B that fits its A")
            ranks.append(shape[0])
            modules[f"{module.removeprefix('base_model.model.')}.weight"] = (other[0], shape[1])
    if not modules:
        raise ConfigError(f"{folder / WEIGHTS}: holds no LoRA factors")
    return AdapterFiles(folder, str(config.get("base_model_name_or_path") or ""), max(ranks), modules)


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, from its header. Raises ConfigError for one that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def check_base(adapter: AdapterFiles, model: str) -> None:
    """Raise ConfigError for an adapter whose matrices do not fit the model's. model: a folder, or a name on a hub.

    A folder is judged by its weights, since paths change; a name by the name in the adapter's configuration. Weights
    that are not plain tell nothing.
    """
    folder = Path(model)
    if not folder.is_dir():
        if adapter.base and adapter.base != model and not Path(adapter.base).is_absolute():
            raise ConfigError(f"{adapter.folder}: is an adapter of {adapter.base}, and not of {model}")
        return
    weights: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= shapes_of(file)
    if not any(name in weights for name in adapter.modules):
        return
    for name, shape in adapter.modules.items():
        if (has := weights.get(name)) != shape:
            what = "is not in the model" if has is None else f"is {list(has)} in the model and {list(shape)} in it"
            raise ConfigError(f"{adapter.folder}: is an adapter of another base than {model}: {name} {what}")
