"""Shards: immutable safetensors files with the blocks of many entries, in the bank's codec.

An entry is one row of a shard; its tensors are named "<row>.<tensor>". Dense positions 0..T-1 are not stored. What is
read is compared with the row's checksums, as ``compared`` decides; a shard of an earlier version, which has none, is
hashed when it is opened.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.ops.block_codec import Codec, codec_from_state, get_codec
from mem_triton.store.bank.checksums import part_checksums
from mem_triton.store.bank.compared import Compared
from mem_triton.store.bank.spec import EXACT_CODECS, BankSpec
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import COMPACT, BankError, not_written
from mem_triton.store.files import write_durably

NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
MAX_ROWS = 1024
MAX_BYTES = 256 << 20
OPEN_SHARDS = 64
TENSORS = ("keys", "values", "key_scale", "value_scale", "head", "positions")
"""The lossless codec of each dtype."""

Row = dict[str, Tensor]
"""One entry's tensors as they lie on the disk."""


@dataclass(frozen=True)
class Shard:
    """A finished shard. rows: how many entries it has."""

    name: str
    bytes: int
    sha256: str
    rows: int


class OpenShard(NamedTuple):
    """A mapped shard. names: of each row's tensors. checksums: uint32 [rows, L, Hkv], None before there were any."""

    file: Any
    names: dict[int, list[str]]
    checksums: np.ndarray | None
    compared: Compared


@dataclass(frozen=True)
class StoredRow:
    """Part of an entry as it lies in a mapped shard, read from the disk when it is used.

    layers, heads: which of the stored ones. right: its checksums, uint32 [L, H], None if the whole shard was hashed.
    damaged: makes the error that says what is wrong with it. compared: decides whether this read is compared, as one of
    many; None: it is.
    """

    number: int
    tensors: Row
    layers: range | tuple[int, ...]
    heads: slice
    right: np.ndarray | None
    damaged: Callable[[str], BankError]
    compared: Compared | None

    def decode(self, codec: Codec, dtype: torch.dtype) -> MemoryBlock:
        """Its keys, values and positions. Raises BankError for what the codec does not know."""
        tensors = dict(self.tensors)
        positions = tensors.pop("positions", None)
        try:
            keys, values = codec.decode(tensors, dtype)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise self.damaged(f"is no block of codec {codec.name} ({error})") from None
        if positions is None:
            positions = torch.arange(keys.shape[2], dtype=torch.int32).expand(keys.shape[:3]).contiguous()
        return MemoryBlock(keys, values, positions)

    def compare(self) -> None:
        """Compare it with its checksums, if that is due. Raises BankError if it has changed since it was written."""
        part = (self.number, self.layers, self.heads.start, self.heads.stop)
        if self.right is None or not (self.compared is None or self.compared.is_due(part)):
            return
        try:
            found = part_checksums(self.number, self.tensors, self.layers, self.heads, self.compared is not None)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise self.damaged(f"cannot be read ({error})") from None
        if not np.array_equal(found, self.right):
            raise self.damaged("has changed since it was written")
        if self.compared is not None:
            self.compared.add(part)


def codec_of(spec: BankSpec, state: bytes | None) -> Codec:
    """The bank's codec. Raises BankError for one that must be trained and was not."""
    try:
        return codec_from_state(spec.codec, state)
    except ValueError as error:
        raise BankError(str(error)) from None


class Shards:
    """The shards of one bank. Thread-safe; files stay mapped for as long as they are in use.

    sha256_of: what the catalogue says of a shard's name, None if it does not know it. compared: decides for a shard's
    path which reads are compared.
    """

    def __init__(
        self,
        folder: Path,
        spec: BankSpec,
        codec: Codec,
        sha256_of: Callable[[str], str | None],
        compared: Callable[[Path], Compared] = Compared,
    ) -> None:
        self.folder, self.spec, self.codec, self._sha256_of = folder, spec, codec, sha256_of
        self.lossless = get_codec(EXACT_CODECS[spec.dtype])  # for the sink, which every request reads
        self._compared = compared
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, block: MemoryBlock, codec: Codec | None = None) -> Row:
        """A block as one row. codec: None for the bank's. Raises BankError for what the codec cannot hold."""
        try:
            row = dict((codec or self.codec).encode(block.keys.detach().cpu(), block.values.detach().cpu()))
        except ValueError as error:
            raise BankError(str(error)) from None
        dense = torch.arange(block.tokens, dtype=torch.int32)
        if not torch.equal(block.positions.cpu(), dense.expand(block.positions.shape)):
            row["positions"] = block.positions.cpu()
        return row

    def write(self, rows: Iterable[Row]) -> Iterator[Shard]:
        """Store rows in as many shards as they need; each is on the disk under its name when it is yielded."""
        part: list[Row] = []
        size = 0
        for row in rows:
            part.append(row)
            size += sum(tensor.nbytes for tensor in row.values())
            if len(part) == MAX_ROWS or size >= MAX_BYTES:
                yield self._write(part)
                part, size = [], 0
        if part:
            yield self._write(part)

    def _write(self, rows: Sequence[Row]) -> Shard:
        tensors = {  # clones, since rows may be parts of one batch
            f"{i}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for i, row in enumerate(rows)
            for name, tensor in row.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        checksums = b"".join(_checksums(i, row).astype("<u4").tobytes() for i, row in enumerate(rows))
        header = {
            "format": "mem_triton.shard",
            "rows": str(len(rows)),
            "codec": self.spec.codec,
            "checksums": base64.b64encode(checksums).decode(),
        }
        try:
            write_durably(path, lambda temporary: save_file(tensors, temporary, metadata=header))
            return Shard(path.name, path.stat().st_size, file_sha256(path), len(rows))
        except (OSError, SafetensorError) as error:
            raise not_written(path, error, COMPACT) from None

    def raw(self, name: str, row: int) -> Row:
        """One entry's tensors, undecoded. Raises FileNotFoundError if the shard is gone, BankError if it is damaged."""
        stored = self.open_row(name, row)
        stored.compare()
        return stored.tensors

    def read(self, name: str, row: int, dtype: torch.dtype, codec: Codec | None = None) -> MemoryBlock:
        """One entry. codec: None for the bank's. Raises as ``raw``."""
        stored = self.open_row(name, row)
        try:
            return stored.decode(codec or self.codec, dtype)
        finally:
            stored.compare()

    def open_row(
        self, name: str, row: int, layers: Sequence[int] | None = None, heads: slice | None = None, ref: str = ""
    ) -> StoredRow:
        """Map part of one entry. layers: indices into the stored layers. ref: of the entry, if requests read it.

        Every tensor of a codec begins with [L, Hkv]. Raises FileNotFoundError if the shard is gone, BankError for what
        is not in it; damage is found by the row's ``compare``.
        """
        file, names, checksums, compared = self._file(name)
        damaged = partial(self._damaged, name, row, ref)
        mine = names.get(row)
        if mine is None:
            raise self._damaged(name, row, "", "is not in it")
        heads = heads or slice(0, self.spec.kv_heads)
        spans = [slice(None)] if layers is None else [slice(first, end) for first, end in runs(layers) or [(0, 0)]]

        def part(piece: Any) -> Tensor:
            found = [piece[span, heads] for span in spans]
            return found[0] if len(found) == 1 else torch.cat(found)

        try:
            tensors = {tensor: part(file.get_slice(f"{row}.{tensor}")) for tensor in mine}
            right = None
            if checksums is not None and tensors["keys"].numel():
                right = checksums[row][:, heads] if layers is None else checksums[row][list(layers), heads]
        except (SafetensorError, RuntimeError, LookupError, TypeError, OSError) as error:
            raise self._damaged(name, row, "", f"cannot be read ({error})") from None
        which = range(len(tensors["keys"])) if layers is None else tuple(layers)
        return StoredRow(row, tensors, which, heads, right, damaged, compared if ref else None)

    def _damaged(self, name: str, row: int, ref: str, what: str) -> BankError:
        about = f'"{ref}": ' if ref else ""
        return BankError(
            f"{about}{self.folder / name}: row {row} {what}; run `mem-triton bank verify`, and restore the file from a "
            "backup or write the entry again",
            ref or None,
        )

    def _file(self, name: str) -> OpenShard:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
        path = self.folder / check_name(name, NAME, self.folder)
        if path.is_symlink():
            raise BankError(f"{path} is a link; a bank's files lie in the bank itself: put the file there")
        if not path.exists():
            raise FileNotFoundError(path)
        if not os.access(path, os.R_OK):
            raise BankError(f"{path}: this user may not read it; let its owner run chmod")
        try:
            shard = self._opened(path)
        except FileNotFoundError:
            raise
        except (SafetensorError, ValueError, LookupError, OSError) as error:
            raise BankError(
                f"{path}: {error}; run `mem-triton bank verify`, and restore the file from a backup"
            ) from None
        with self._lock:
            self._open[name] = shard
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _opened(self, path: Path) -> OpenShard:
        file = safe_open(path, framework="pt")
        names: dict[int, list[str]] = {}
        for full in file.keys():  # noqa: SIM118
            row, _, tensor = full.partition(".")
            if tensor not in TENSORS:
                raise ValueError(f"has a tensor {full!r}, which no shard has")
            names.setdefault(int(row), []).append(tensor)
        header = file.metadata() or {}
        if "checksums" in header:
            found = np.frombuffer(base64.b64decode(header["checksums"], validate=True), "<u4")
            return OpenShard(
                file, names, found.reshape(int(header["rows"]), -1, self.spec.kv_heads), self._compared(path)
            )
        right = self._sha256_of(path.name)
        if right is None:  # compact has moved its rows meanwhile
            raise FileNotFoundError(path)
        if file_sha256(path) != right:
            raise ValueError("has changed since it was written")
        return OpenShard(file, names, None, self._compared(path))

    def forget(self, name: str) -> None:
        """Let go of a shard that was removed, so that the disk has its room again."""
        with self._lock:
            self._open.pop(name, None)

    def close(self) -> None:
        """Let go of every open shard."""
        with self._lock:
            self._open.clear()


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive indices as [first, end) pairs: [0, 1, 2, 5] -> [(0, 3), (5, 6)]."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def check_name(name: Any, form: re.Pattern, folder: Path) -> str:
    """A file's name as a catalogue has it. Raises BankError for what is no name that a bank gives, such as a path."""
    if not isinstance(name, str) or not form.fullmatch(name):
        raise BankError(f"{folder}: the catalogue names a file {name!r}, which no bank does; restore it from a backup")
    return name


def _checksums(number: int, row: Row) -> np.ndarray:
    layers, heads = row["keys"].shape[:2]
    return part_checksums(number, row, range(layers), slice(0, heads))


def file_sha256(path: Path) -> str:
    """Hash of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
