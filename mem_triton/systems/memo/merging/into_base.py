"""Adds LoRA adapters to the weights of their base model: one whole model that answers as the base with the adapter."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mem_triton.store.files import read_object
from mem_triton.systems.lora import files_digest
from mem_triton.systems.memo.merging.adapters import merged_delta, modules_of, parts_of, read_adapters
from mem_triton.systems.memo.merging.arithmetic import MergeError, MergeRecipe
from mem_triton.systems.memo.merging.checkpoints import RECORD, ModelTensors, copy_rest, new_folder, write_record

PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""


def merge_into_base(recipe: MergeRecipe, folders: list[Path], base: Path, out: Path) -> dict[str, Any]:
    """Write the base model with what the adapters add into the new folder ``out``; returns what was done.

    Each sum is computed in fp32 and kept in the base's dtype. The layout of the files, configuration and tokenizer are
    the base's. Raises MergeError naming option, folder or tensor.
    """
    adapters = read_adapters(recipe, folders)
    modules = {f"{name.removeprefix(PREFIX)}.weight": name for name in modules_of(adapters)}
    with ExitStack() as stack, new_folder(out) as made:
        model = ModelTensors(base, stack)
        if missing := sorted(modules.keys() - model.names):
            raise MergeError(f"{missing[0]}: {folders[0]} changes it, and {base} has no such weight; is it their base?")
        for file, names in model.layout.items():
            tensors = {}
            for name in names:
                tensors[name] = weight = model[name]
                if (module := modules.get(name)) is not None:
                    delta = merged_delta(recipe, parts_of(adapters, module), module)
                    tensors[name] = _sum(name, weight, delta, base, folders[0])
            save_file(tensors, made / file, metadata={"format": "pt"})
        copy_rest(model, made)
        told = {"tensors": len(model.names), "changed": len(modules)}
        digests = [files_digest(str(folder)) for folder in folders]
        write_record(made, recipe, folders, base, {**told, "digests": digests})
    return told


def merged_once(adapter: Path, base: Path, out: Path) -> None:
    """Write the base with one adapter into ``out`` unless it is there.

    Raises MergeError for a folder that holds another merge, or something else.
    """
    if not (out / RECORD).is_file():
        merge_into_base(MergeRecipe("linear"), [adapter], base, out)
        return
    said = read_object(out / RECORD, "remove the folder", MergeError)
    if said.get("base") != str(base) or said.get("digests") != [files_digest(str(adapter))]:
        raise MergeError(f"{out}: holds another merge than {adapter} into {base}; remove it")


def _sum(name: str, weight: Tensor, delta: Tensor, base: Path, adapter: Path) -> Tensor:
    if weight.shape != delta.shape:
        raise MergeError(f"{name}: {list(weight.shape)} in {base} and {list(delta.shape)} in {adapter}")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise MergeError(f"{name}: {base} holds it as {weight.dtype}; adapters are merged into plain weights alone")
    return (weight.float() + delta).to(weight.dtype)
