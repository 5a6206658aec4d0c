"""An opened bank: its directory, files and locks, and the few reads that writing, maintenance and transfer build on.

The modules beside this one are functions of an ``OpenedBank``; ``mem_triton.store.bank.bank.Bank`` derives from it and
offers them as methods.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from mem_triton.store.bank.catalogue import Catalogue
from mem_triton.store.bank.creation import check_free, check_unchanged, read_spec
from mem_triton.store.bank.embedders import FEATURES, Embedder, embedder_from, features_of
from mem_triton.store.bank.shards import Shards, codec_of
from mem_triton.store.bank.spec import BankSpec, EntryInfo
from mem_triton.store.bank.vectors import VectorIndex
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import BankError, ForeignTenantError, not_written
from mem_triton.store.files import Reserve, WriterLock, write_durably


class OpenedBank:
    """Holds an opened bank's files and locks. Made by ``create`` and ``open``; thread-safe; a context manager.

    path: its directory. spec: its ``bank.json``. writing: lock of the one thread that writes at a time.
    """

    def __init__(
        self, path: Path, spec: BankSpec, catalogue: Catalogue, lock: WriterLock | None, embedder: Embedder | None
    ) -> None:
        self.path, self.spec, self.catalogue = path, spec, catalogue
        check_unchanged(path, spec, catalogue.meta("spec"))
        self.shards = Shards(path / "shards", spec, codec_of(spec, catalogue.meta("codec_state")), self._sha256_of)
        self.vectors = VectorIndex(path / "index", catalogue)
        self.reserve = Reserve(path)
        self.writing = threading.RLock()  # one thread at a time
        self._lock, self._embedder, self._features = lock, embedder, None

    @classmethod
    def create(cls, path: str | Path, spec: BankSpec, codec_state: bytes | None = None) -> Self:
        """A new, empty bank, open for writing. codec_state: of a codec that is trained ("pq").

        Raises BankError if there is a bank or a foreign file, or if the codec is not trained.
        """
        path = Path(path)
        codec_of(spec, codec_state)
        try:
            check_free(path, locked=False)
            for folder in ("", "shards", "index"):
                (path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(path, error) from None
        lock = WriterLock(path / "writer.lock")
        catalogue = None
        try:
            check_free(path, locked=True)
            for leftover in path.glob("catalogue.sqlite*"):  # of a creation that did not get as far as bank.json
                leftover.unlink()
            meta = {"bank": uuid.uuid4().hex, "codec_state": codec_state, "features": FEATURES}
            meta |= {"spec": spec.model_dump_json()}
            catalogue = Catalogue.create(path / "catalogue.sqlite", meta)
            text = spec.model_dump_json(indent=1) + "\n"
            write_durably(path / "bank.json", lambda temporary: temporary.write_text(text))  # last: now it is a bank
            bank = cls(path, spec, catalogue, lock, None)
            bank.reserve.fill()
            return bank
        except BaseException as error:
            if catalogue is not None:
                catalogue.close()
            lock.release()
            if isinstance(error, OSError) and error.errno:
                raise not_written(path, error) from error
            raise

    @classmethod
    def open(
        cls, path: str | Path, writable: bool = False, embedder: Embedder | None = None, wait: float = 0.0
    ) -> Self:
        """An existing bank. wait: seconds to wait for another writer. embedder: instead of the one that the spec names.

        Raises BankError for what is no bank or a newer one, BankLockedError naming the process that writes it.
        """
        path = Path(path)
        spec = read_spec(path)
        lock = WriterLock(path / "writer.lock", wait) if writable else None
        catalogue = None
        try:
            connect = partial(Catalogue, path / "catalogue.sqlite", writable)
            catalogue = Reserve(path).run(connect) if writable else connect()
            bank = cls(path, spec, catalogue, lock, embedder)
            if writable:
                bank.vectors.repair()
            return bank
        except BaseException:
            if catalogue is not None:
                catalogue.close()
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        """Let go of its files, and let the next writer in."""
        self.catalogue.close()
        self.shards.close()
        if self._lock is not None:
            if self.writable:
                self.reserve.fill()
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _sha256_of(self, shard: str) -> str | None:
        rows = self.catalogue.read("SELECT sha256 FROM shards WHERE name = ?", shard)
        return rows[0][0] if rows else None

    @property
    def writable(self) -> bool:
        """Whether this is the writer; a forked child of it is not."""
        return self._lock is not None and self._lock.pid == os.getpid()

    @property
    def revision(self) -> int:
        """Grows with every committed change, whoever made it."""
        return self.catalogue.meta("revision")

    @property
    def identity(self) -> str:
        """Hash of what an entry's effect depends on besides its reference: this bank, its specification, its sink."""
        parts = (self.catalogue.meta("bank"), self.spec.model_dump_json(), self.catalogue.meta("sink") or "")
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]

    @property
    def embedder(self) -> Embedder:
        """The embedder of its specification, made when first needed. Raises EmbedderError, BankError."""
        features = features_of(self.spec.embedder, self.catalogue.meta("features"))
        if self._embedder is None:
            self._embedder, self._features = embedder_from(self.spec.embedder, features), features
        elif self._features not in (None, features):  # somebody has reindexed it
            self._embedder, self._features = embedder_from(self.spec.embedder, features), features
            self.vectors = VectorIndex(self.path / "index", self.catalogue)
        dim = self.catalogue.meta("dim")
        if dim not in (None, self._embedder.dim):
            raise BankError(
                f"embedder {self._embedder.name} gives {self._embedder.dim} numbers, {self.path} has vectors of {dim}; "
                f"use the embedder that wrote it ({self.spec.embedder})"
            )
        return self._embedder

    def resolve(self, id_or_ref: str, tenant: str = "", any_tenant: bool = False) -> EntryInfo:
        """An entry that ``tenant`` may see: its own and everybody's (""). An id means its newest version.

        Raises UnknownEntryError, ForeignTenantError with the same message.
        """
        info = self.catalogue.info(id_or_ref)
        if not any_tenant and info.tenant not in ("", tenant):
            raise ForeignTenantError(id_or_ref)
        return info

    def sink(self, dtype: torch.dtype | None = None) -> MemoryBlock | None:
        """The constant prefix, [num_layers, Hkv, p, D], if the bank has one."""
        sink = self.catalogue.meta("sink")
        if sink is None:
            return None
        shards, dtype = self.shards, dtype or self.spec.torch_dtype
        return shards.read(json.loads(sink)["name"], 0, dtype, shards.lossless)
