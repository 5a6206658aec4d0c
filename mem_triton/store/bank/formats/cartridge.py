"""Cartridges of HazyResearch (arXiv 2506.06266): one ``.pt`` with a KV cache that was trained on a document.

A dict of four ``ParameterList``: ``trainable_keys``, ``trainable_values``, and ``fixed_*`` or ``frozen_*``, which may
be empty and stand before them; one tensor [1, Hkv, n, D] a layer (https://github.com/HazyResearch/cartridges). Beside
it lies ``config.yaml``, whose tags would run Python: it is parsed into nodes and never built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.bank.formats.pickled import load_pickled
from mem_triton.store.bank.formats.trained import TRAIN_AGAIN, TrainedEntry, check_numbers
from mem_triton.store.errors import ArtifactError

STEP = re.compile(r"cache-step(\d+)\.pt")
NEWER = ("attention_biases", "gdn_state")
"""What newer files hold for hybrid models: biases of logits, and states of linear attention."""
MOST_YAML = 1 << 20


def best_name(names: Iterable[str]) -> str | None:
    """Which of a folder's files is its cartridge: ``cartridge.pt``, ``cache_last.pt``, else the latest step."""
    names = set(names)
    for name in ("cartridge.pt", "cache_last.pt"):
        if name in names:
            return name
    steps = [(int(match[1]), name) for name in names if (match := STEP.fullmatch(name))]
    return max(steps)[1] if steps else None


def read_cartridge(file: Path, model: Fingerprint) -> TrainedEntry:
    """A cartridge for ``model``. Raises ArtifactError naming the tensor that does not fit."""
    held = load_pickled(file, [nn.ParameterList])
    first = "fixed" if "fixed_keys" in held else "frozen"
    names = [f"{part}_{what}" for part in (first, "trainable") for what in ("keys", "values")]
    if newer := [name for name in NEWER if held.get(name) is not None]:
        raise ArtifactError(f"{file}: holds {newer[0]}, of a hybrid model, which is not served; {TRAIN_AGAIN}")
    if missing := [name for name in names if name not in held]:
        raise ArtifactError(f"{file}: has no {missing[0]}; give a cartridge as HazyResearch's code saves it")
    if others := sorted(str(name)[:60] for name in held.keys() - {*names, *NEWER}):
        raise ArtifactError(f"{file}: holds {others[0]}, which this version does not know; upgrade mem_triton")
    lists = {name: _tensors(file, name, held[name], model) for name in names}
    halves = []
    for what in ("keys", "values"):
        fixed, trainable = lists[f"{first}_{what}"], lists[f"trainable_{what}"]
        if not trainable:
            raise ArtifactError(f"{file}: trainable_{what} is empty; {TRAIN_AGAIN}")
        layers = [torch.cat(pair, 1) for pair in zip(fixed, trainable, strict=True)] if fixed else trainable
        if len(rows := {layer.shape[1] for layer in layers}) > 1:
            raise ArtifactError(f"{file}: {what} have {sorted(rows)} rows in different layers; save it again")
        halves.append(torch.stack(layers))
    keys, values = halves
    if keys.shape != values.shape:
        raise ArtifactError(f"{file}: {keys.shape[2]} rows of keys, {values.shape[2]} of values; save it again")
    fixed = lists[f"{first}_keys"]
    frozen = fixed[0].shape[1] if fixed else 0
    return TrainedEntry("cartridge", str(file), keys, values, frozen=frozen, base_model=_base_model(file.parent))


def _tensors(file: Path, name: str, held: Any, model: Fingerprint) -> list[Tensor]:
    """One list of a cartridge: [] or a tensor fp32 [Hkv, n, D] for each layer."""
    if isinstance(held, nn.ParameterList):  # what the file says of itself, whatever else it has set
        items = vars(held).get("_parameters")
        held = list(items.values()) if isinstance(items, Mapping) else None
    if not isinstance(held, (list, tuple)) or not all(isinstance(item, Tensor) for item in held):
        raise ArtifactError(f"{file}: {name} is no list of tensors; give a cartridge as HazyResearch's code saves it")
    if len(held) not in (0, model.num_layers):
        raise ArtifactError(f"{file}: {name} has {len(held)} layers, the model {model.num_layers}; {TRAIN_AGAIN}")
    found = []
    for layer, tensor in enumerate(held):
        shape = tuple(tensor.shape)
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (1, model.kv_heads, model.head_dim):
            raise ArtifactError(
                f"{file}: {name}[{layer}] is {list(shape)}, expected [1, {model.kv_heads}, rows, {model.head_dim}] "
                f"(KV heads, head size); {TRAIN_AGAIN}"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a few bytes that say they are many
            raise ArtifactError(f"{file}: {name}[{layer}] is larger than what is stored of it; save it again")
        found.append(check_numbers(str(file), f"{name}[{layer}]", tensor[0]))
    return found


def _base_model(folder: Path) -> str | None:
    """The model's name in ``config.yaml``, None if it says none that can be read."""
    file = folder / "config.yaml"
    try:
        if file.stat().st_size > MOST_YAML:
            return None
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    for key in ("model", "value", "pretrained_model_name_or_path"):
        inner = _child(node, key)
        node = node if inner is None and key == "value" else inner  # wandb puts a value around each
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if getattr(name, "value", None) == key), None)
