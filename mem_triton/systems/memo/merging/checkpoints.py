"""Merges folders of whole models, tensor by tensor, in the layout of the first one's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.store.files import INDEX, SINGLE, indexed_files, is_occupied
from mem_triton.systems.memo.merging.arithmetic import MergeError, MergeRecipe, merge

RECORD = "mem_triton_merge.json"
"""What a merged folder says of how it was made."""


class ModelTensors:
    """A folder of safetensors; tensors are read one at a time. Raises MergeError naming folder and fault."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files = _files(folder)
        self._where: dict[str, Any] = {}
        self.layout: dict[str, list[str]] = {}
        for name in self.files:
            try:
                opened = stack.enter_context(safe_open(folder / name, framework="pt"))
                self.layout[name] = list(opened.keys())
            except (OSError, SafetensorError) as error:
                raise MergeError(f"{folder / name}: {error}") from None
            self._where |= dict.fromkeys(self.layout[name], opened)

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def _files(folder: Path) -> list[str]:
    if (found := indexed_files(folder, "fetch or save the model again", MergeError)) is not None:
        return sorted(set(found.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise MergeError(f"{folder}: holds no {SINGLE} and no {INDEX}; only safetensors are merged")


def merge_checkpoints(recipe: MergeRecipe, folders: list[Path], base: Path | None, out: Path) -> dict[str, Any]:
    """Merge models into the new folder ``out``, which is there whole or not at all; returns what was done.

    Configuration and tokenizer are those of the first model. Raises MergeError naming option, folder or tensor.
    """
    recipe.check(len(folders), base is not None)
    with ExitStack() as stack, new_folder(out) as made:
        models = [ModelTensors(folder, stack) for folder in folders]
        start = ModelTensors(base, stack) if base is not None else None
        _check_alike([*models, *([start] if start else [])])
        changed = 0
        for file, names in models[0].layout.items():
            tensors = {}
            for name in names:
                tensors[name] = _merged(recipe, name, models, start)
                changed += not torch.equal(tensors[name], models[0][name])
            save_file(tensors, made / file, metadata={"format": "pt"})
        copy_rest(models[0], made)
        told = {"tensors": len(models[0].names), "changed": changed}
        write_record(made, recipe, folders, base, told)
    return told


def copy_rest(model: ModelTensors, made: Path) -> None:
    """Copy a model's configuration and tokenizer, all but its weights."""
    for path in model.folder.iterdir():
        if path.is_file() and path.name not in model.files and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, made / path.name)


def _check_alike(checkpoints: list[ModelTensors]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if different := sorted(first.names ^ other.names):
            where = first.folder if different[0] in first.names else other.folder
            raise MergeError(f"{different[0]}: only {where} has it; {first.folder} and {other.folder} are other models")


def _merged(recipe: MergeRecipe, name: str, models: list[ModelTensors], base: ModelTensors | None) -> Tensor:
    tensors = [model[name] for model in models]
    start = base[name] if base is not None else None
    for checkpoint, tensor in zip([*models, base], [*tensors, start], strict=True):
        if tensor is not None and tensor.shape != tensors[0].shape:
            shape, other = list(tensors[0].shape), list(tensor.shape)
            raise MergeError(f"{name}: {shape} in {models[0].folder} and {other} in {checkpoint.folder}")
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise MergeError(f"{name}: holds whole numbers that differ; they cannot be merged")
        return tensors[0]
    return merge(recipe, tensors, start, name).contiguous()


def write_record(
    folder: Path, recipe: MergeRecipe, folders: list[Path], base: Path | None, told: Mapping[str, Any]
) -> None:
    """Say beside the weights how they were made."""
    said = {
        "recipe": asdict(recipe),
        "models": [str(f) for f in folders],
        "base": str(base) if base else None,
        **told,
    }
    (folder / RECORD).write_text(json.dumps(said, indent=1) + "\n")


class new_folder:
    """A folder that gets its name when all is in it, and is taken away again if something goes wrong."""

    def __init__(self, out: Path) -> None:
        self.out, self.made = out, out.with_name(f".writing-{out.name}")

    def __enter__(self) -> Path:
        if is_occupied(self.out):
            raise MergeError(f"--out: {self.out} is there already; name a new folder")
        if not self.out.absolute().parent.is_dir():
            raise MergeError(f"--out: there is no folder {self.out.parent}")
        shutil.rmtree(self.made, ignore_errors=True)  # of a run that was killed
        self.made.mkdir()
        return self.made

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.made, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise MergeError(f"{self.out}: {error}; nothing was written") from None
            return
        if self.out.exists():
            self.out.rmdir()
        self.made.rename(self.out)
