"""The memory bank: a directory of entries, each a text with the keys and values that a model made of it.

Entries are immutable and versioned. One process writes, any number read at the same time and see each commit at once.
Nothing that was acknowledged is lost and nothing half-written is seen, whenever a process dies: docs/bank-format.md says
why.

Example::

    with Bank.create("facts", spec) as bank:
        bank.add([NewEntry("mara", "The locker of Mara Stone is falcon.", block)])       # ["mara@1"]
    bank = Bank.open("facts")
    ref = bank.search("Whose locker is falcon?", top_k=1)[0].ref
    bank.load(ref, layers=[0, 1], heads=slice(0, 4)).keys                                # [2, 4, T, D]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mem_triton.store.block import MemoryBlock
from mem_triton.store.fingerprint import Fingerprint
from mem_triton.store.index import Embedder
from mem_triton.store.spec import (
    BankError,
    BankLockedError,
    BankModelError,
    BankSpec,
    EntryInfo,
    ForeignTenantError,
    Hit,
    NewEntry,
    UnknownEntryError,
    content_hash,
)

__all__ = [
    "Bank",
    "BankError",
    "BankLockedError",
    "BankModelError",
    "BankSpec",
    "EntryInfo",
    "ForeignTenantError",
    "Hit",
    "NewEntry",
    "UnknownEntryError",
    "content_hash",
]


class Bank:
    """See the module. Made by ``create`` and ``open``; thread-safe; a context manager.

    path: its directory. spec: its ``bank.json``.
    """

    path: Path
    spec: BankSpec

    @classmethod
    def create(cls, path: str | Path, spec: BankSpec, codec_state: bytes | None = None) -> Bank:
        """A new, empty bank, open for writing. codec_state: of a trained codec ("pq"). Raises BankError if there is one."""
        raise NotImplementedError

    @classmethod
    def open(
        cls, path: str | Path, writable: bool = False, embedder: Embedder | None = None, wait: float = 0.0
    ) -> Bank:
        """An existing bank. wait: seconds to wait for another writer. embedder: instead of the one that the spec names.

        Raises BankError for what is no bank or a newer one, BankLockedError naming the process that writes it.
        """
        raise NotImplementedError

    def close(self) -> None: ...
    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def revision(self) -> int:
        """Grows with every committed change, whoever made it."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """Hash of what every entry's effect depends on besides its reference: this bank, its specification, its sink."""
        raise NotImplementedError

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raises BankModelError listing the fields in which the model differs from the bank's."""
        raise NotImplementedError

    def add(self, entries: Sequence[NewEntry]) -> list[str]:
        """Write new entries in one transaction and return their references; all of them, or none."""
        raise NotImplementedError

    def update(self, id: str, entry: NewEntry) -> str:
        """Write an entry's next version and return its reference; earlier ones stay loadable until ``compact``."""
        raise NotImplementedError

    def fill(self, ref: str, block: MemoryBlock) -> None:
        """Give a cold entry its block, once."""
        raise NotImplementedError

    def fill_all(self, blocks: Mapping[str, MemoryBlock]) -> None:
        """``fill`` for many references in one transaction."""
        raise NotImplementedError

    def delete(self, id_or_ref: str) -> None:
        """Hide an entry with all its versions, or one version; its versions' numbers are never given again."""
        raise NotImplementedError

    def knows(self, id_or_ref: str, tenant: str = "") -> bool:
        """Whether ``resolve`` would find it."""
        raise NotImplementedError

    def resolve(self, id_or_ref: str, tenant: str = "", any_tenant: bool = False) -> EntryInfo:
        """An entry that ``tenant`` may see; an id means its newest version. Raises Unknown- and ForeignTenantError."""
        raise NotImplementedError

    def token_ids(self, ref: str) -> list[int] | None:
        """The tokens that an entry was written with."""
        raise NotImplementedError

    def load(
        self,
        ref: str,
        layers: Sequence[int] | None = None,
        heads: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryBlock:
        """An entry's block, or the part of it in some layers (indices of the model) and KV heads; no more is read."""
        raise NotImplementedError

    def set_sink(self, block: MemoryBlock) -> None:
        """Store the constant prefix, in all layers of the model. Only in a bank without entries, or the same again."""
        raise NotImplementedError

    def sink(self) -> MemoryBlock | None:
        """The constant prefix, [num_layers, Hkv, p, D], if the bank has one."""
        raise NotImplementedError

    def list(
        self, tenant: str | None = None, after: str | None = None, limit: int = 100, only_cold: bool = False
    ) -> list[EntryInfo]:
        """Entries by id, those behind the id ``after``. tenant: None for all, else its own and everybody's."""
        raise NotImplementedError

    def search(
        self, text: str, top_k: int, tenant: str = "", source: str | None = None, only_filled: bool = False
    ) -> list[Hit]:
        """The entries nearest in meaning that ``tenant`` may see, best first. only_filled: none that are cold."""
        raise NotImplementedError

    def find_hash(self, content_hash: str, tenant: str = "") -> str | None:
        """Newest version with this content: the tenant's own, else everybody's."""
        raise NotImplementedError

    def verify(self) -> list[str]:
        """Problems found in shards, catalogue and index, each naming its file or reference; empty if all is well."""
        raise NotImplementedError

    def compact(self) -> dict[str, int]:
        """Drop deleted and superseded versions and orphaned files. Readers go on with what they hold."""
        raise NotImplementedError

    def export(self, destination: str | Path, ids: Sequence[str] | None = None, tenant: str | None = None) -> list[str]:
        """Write entries with their versions to a new directory, or to a tar if its name ends so. ids: None for all."""
        raise NotImplementedError

    def import_from(self, source: str | Path) -> list[str]:
        """Add what ``export`` wrote, under the same references. Raises BankError on another model, or a taken id."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Numbers of entries, versions, tenants, shards and bytes."""
        raise NotImplementedError
