"""Files of a pool: snapshots of all rows, and what each version changed. Written whole or not at all, never changed.

A delta names the version before it by a chained hash, so a missing, exchanged or damaged file is found before its
numbers are used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mem_triton import ids
from mem_triton.store.errors import BankError, not_written
from mem_triton.store.files import WRITING, write_durably
from mem_triton.systems.memoryllm.long_term import LongTerm, LongTermRows
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton.systems.memoryllm.update import UpdateStep

NAME = re.compile(r"(\d{10})\.(snapshot|delta)\.safetensors")
FORMAT = "mem_triton.pool.v1"
STORE, POOL, STORES = "memory.json", "pool.json", "mem_triton.pools.v1"
"""Files that say what a store holds, and what a pool is called; a store's format."""


class PoolError(BankError):
    """A store of pools cannot do what was asked; names the pool or the file, and the fix."""


class UnknownPoolError(PoolError):
    """There is no such pool, or not for this tenant."""


@dataclass(frozen=True)
class Snapshot:
    """All rows [L, N, d] of a version. link: the chain's hash at it; state: of the pool's generator. long: of M+."""

    rows: Tensor
    state: Tensor
    link: str
    long: LongTerm | None = None


@dataclass(frozen=True)
class Delta:
    """What a version changed, step by step; before: the chain's hash at the version before it."""

    steps: tuple[UpdateStep, ...]
    state: Tensor
    link: str
    before: str
    tokens: int


def file_name(version: int, kind: str) -> str:
    """Of a version's snapshot or delta."""
    return f"{version:010d}.{kind}.safetensors"


def versions(folder: Path) -> dict[str, set[int]]:
    """The versions of which there is a snapshot, and of which there is a delta."""
    found: dict[str, set[int]] = {"snapshot": set(), "delta": set()}
    for path in folder.iterdir():
        if match := NAME.fullmatch(path.name):
            found[match[2]].add(int(match[1]))
    return found


def digest_of(tensors: Mapping[str, Tensor], *words: object) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, and over what else is said."""
    digest = hashlib.sha256(json.dumps([str(word) for word in words]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"|{name} {tensor.dtype} {list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, and what its header says. Raises OSError, SafetensorError or ValueError."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write_snapshot(
    folder: Path, version: int, rows: Tensor, state: Tensor, link: str | None, long: LongTerm | None = None
) -> str:
    """Store all rows of a version, long-term ones too; the chain's hash at it. link: None begins a chain."""
    tensors = {"rows": rows.contiguous(), "generator": state} | ({} if long is None else _long_tensors(long))
    digest = digest_of(tensors, "snapshot", version)
    _write(folder, version, "snapshot", tensors, {"digest": digest, "link": link or digest})
    return link or digest


def write_delta(
    folder: Path, version: int, steps: Sequence[UpdateStep], state: Tensor, before: str, tokens: int
) -> str:
    """Store what a version changed; the chain's hash at it. before: that of the version before, "" for the first."""
    tensors = {"generator": state}
    for i, step in enumerate(steps):
        tensors[f"{i}.delta"] = step.delta.contiguous()
        if step.dropped is not None:
            tensors[f"{i}.dropped"] = step.dropped.contiguous()
        if step.keys is not None:
            tensors[f"{i}.keys"] = step.keys.contiguous()
    link = digest_of(tensors, "delta", version, before, tokens)
    about = {"digest": link, "link": link, "before": before, "tokens": str(tokens)}
    _write(folder, version, "delta", tensors, about)
    return link


def read_snapshot(folder: Path, version: int) -> Snapshot:
    """A version's rows. Raises PoolError naming the file if it is damaged."""
    tensors, about = _read(folder, version, "snapshot")
    path = folder / file_name(version, "snapshot")
    if digest_of(tensors, "snapshot", version) != about.get("digest") or not {"rows", "generator"} <= set(tensors):
        raise damaged(path, "has changed since it was written")
    try:
        long = _long_of(tensors) if "long.clock" in tensors else None
    except (LookupError, ValueError) as error:
        raise damaged(path, f"has no whole long-term memory ({error})") from None
    return Snapshot(tensors["rows"], tensors["generator"], str(about.get("link")), long)


def read_delta(folder: Path, version: int) -> Delta:
    """What a version changed. Raises PoolError naming the file if it is damaged."""
    tensors, about = _read(folder, version, "delta")
    path = folder / file_name(version, "delta")
    before, tokens = (about.get(name, "") for name in ("before", "tokens"))
    if digest_of(tensors, "delta", version, before, tokens) != about.get("link"):
        raise damaged(path, "has changed since it was written")
    count = sum(name.endswith(".delta") for name in tensors)  # the digest covers their names
    parts = [[tensors.get(f"{i}.{part}") for part in ("delta", "dropped", "keys")] for i in range(count)]
    steps = tuple(UpdateStep(*part) for part in parts)
    return Delta(steps, tensors["generator"], about["link"], before, int(tokens))


def write_store(path: Path, shape: PoolShape, about: Mapping[str, Any]) -> None:
    """Store what all pools of a store have in common. about: of the model."""
    said = {"shape": asdict(shape), "about": dict(about)}
    text = json.dumps({"format": STORES, **said, "digest": _store_digest(said)}, indent=1) + "\n"
    write_durably(path / STORE, lambda temporary: temporary.write_text(text))


def read_store(path: Path) -> tuple[PoolShape, dict[str, Any]]:
    """What ``write_store`` has stored. Raises PoolError for what is no store, or damaged."""
    try:
        data = json.loads((path / STORE).read_text(encoding="utf-8"))
        if data["format"] != STORES:
            raise PoolError(f"{path / STORE}: format is {data['format']!r}, expected {STORES}; upgrade mem_triton")
        shape, about = PoolShape.of(data["shape"]), dict(data["about"])
        if data.get("digest") not in (None, _store_digest({"shape": data["shape"], "about": data["about"]})):
            raise ValueError("it has changed since it was written")
    except PoolError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PoolError(
            f"{path} is no store of pools: {STORE}: {error}; make one with `mem-triton convert memoryllm`"
        ) from None
    return shape, about


def _store_digest(said: Mapping[str, Any]) -> str:
    """Files of before have none."""
    return digest_of({}, json.dumps(said, sort_keys=True))


def read_about(folder: Path) -> tuple[str, str, str]:
    """(name, tenant, identity) of a pool. Raises PoolError if its file is damaged."""
    try:
        data = json.loads((folder / POOL).read_text(encoding="utf-8"))
        about = data["name"], data["tenant"], data["identity"]
        if data["digest"] != digest_of({}, *about):
            raise ValueError("its digest is another")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(folder / POOL, f"cannot be read ({error})") from None
    return about


def fresh_generator(folder: Path) -> Tensor:
    """The state with which a pool's own generator begins: of its identity, so that a replay gives the same."""
    return torch.Generator().manual_seed(int(read_about(folder)[2][:15], 16)).get_state()


def tidy(pools: Path) -> None:
    """Remove what a writer that was killed has left unfinished."""
    for entry in pools.iterdir():
        if entry.name.startswith((".making-", ".deleted-")):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_dir():
            for leftover in entry.glob(f"{WRITING}*"):
                with suppress(OSError):  # the write of that name will say what is wrong
                    leftover.unlink()


def directory(name: str, tenant: str) -> str:
    """The folder's name of a pool."""
    return f"{tenant}:{name}" if tenant else name


def split(reference: str) -> tuple[str, int | None]:
    """("main", 2) of "main@2", ("main", None) of "main". Raises PoolError for what names no pool."""
    found = ids.split_reference(reference)
    if found is None or not ids.is_name(found[0]):
        raise PoolError(f'"{str(reference)[:200]}" names no pool; a pool is called "name" or "name@version"')
    return found


def damaged(path: Path, what: str) -> PoolError:
    """The error of a file that cannot be used."""
    return PoolError(f"{path}: {what}; restore the pool's folder from a backup, or read an earlier version")


def _long_tensors(long: LongTerm) -> dict[str, Tensor]:
    """By names such as ``long.merged.3.0.keys``: of layer 3, the first rows that were dropped together."""
    found = {"long.clock": torch.tensor(long.clock), "long.ages": long.ages, "long.keys": long.keys}
    for kind, layers in (("merged", long.merged), ("fresh", long.fresh)):
        for layer, parts in enumerate(layers):
            for i, part in enumerate(parts):
                own = {"rows": part.content[0], "keys": part.keys, "stamps": part.stamps, "often": part.frequencies}
                found |= {f"long.{kind}.{layer}.{i}.{name}": x for name, x in own.items()}
    return {name: x.contiguous() for name, x in found.items()}


def _long_of(tensors: Mapping[str, Tensor]) -> LongTerm:
    """What ``_long_tensors`` has made. Raises KeyError for a tensor that is missing."""

    def layers(kind: str) -> tuple[tuple[LongTermRows, ...], ...]:
        found = []
        for layer in range(len(tensors["rows"])):
            parts: list[LongTermRows] = []
            while f"long.{kind}.{layer}.{len(parts)}.rows" in tensors:
                rows, *rest = (
                    tensors[f"long.{kind}.{layer}.{len(parts)}.{x}"] for x in ("rows", "keys", "stamps", "often")
                )
                parts.append(LongTermRows((rows,), *rest))
            found.append(tuple(parts))
        return tuple(found)

    return LongTerm(
        int(tensors["long.clock"]), tensors["long.ages"], tensors["long.keys"], layers("merged"), layers("fresh")
    )


def _write(folder: Path, version: int, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    path = folder / file_name(version, kind)
    header = {"format": FORMAT, "version": str(version), **about}
    try:
        write_durably(path, lambda temporary: save_file(dict(tensors), temporary, metadata=header))
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from None


def _read(folder: Path, version: int, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = folder / file_name(version, kind)
    try:
        tensors, about = tensors_of(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    if about.get("format") != FORMAT or about.get("version") != str(version):
        raise damaged(path, f"is no {kind} of version {version}")
    return tensors, about
