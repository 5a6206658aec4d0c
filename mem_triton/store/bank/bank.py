"""The memory bank: a directory of entries, each a text with the keys and values that a model made of it.

Entries are immutable and versioned. One process writes, any number read at the same time and see each commit at once.
Nothing that was acknowledged is lost and nothing half-written is seen, whenever a process dies: docs/bank-format.md
says why.

Example::

    with Bank.create("facts", spec) as bank:
        bank.add([NewEntry("mara", "The locker of Mara Stone is falcon.", block)])       # ["mara@1"]
    bank = Bank.open("facts")
    ref = bank.search("Whose locker is falcon?", top_k=1)[0].ref
    bank.load(ref, layers=[0, 1], heads=slice(0, 4)).keys                                # [2, 4, T, D]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mem_triton.store.bank import maintenance, transfer, writing
from mem_triton.store.bank.fingerprint import Fingerprint
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.shards import StoredRow, runs
from mem_triton.store.bank.spec import EntryInfo, Hit, NewEntry, split_ref
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import (
    BankError,
    BankModelError,
    UnknownEntryError,
)


class Bank(OpenedBank):
    """Reads and writes entries. Made by ``create`` and ``open``; thread-safe; a context manager.

    path: its directory. spec: its ``bank.json``.
    """

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raises BankModelError listing the fields in which the model differs from the bank's."""
        if differences := self.spec.fingerprint.differences(fingerprint):
            raise BankModelError(self.path, differences)

    # Writing.

    def add(self, entries: Sequence[NewEntry]) -> list[str]:
        """Write new entries in one transaction and return their references; all of them, or none.

        Raises BankError naming the entry and the field that is wrong, and for an id that exists.
        """
        return writing.add(self, entries, update=False)

    def update(self, id: str, entry: NewEntry) -> str:
        """Write an entry's next version and return its reference; earlier ones stay loadable until ``compact``.

        Raises UnknownEntryError if there is none to update, ForeignTenantError if it is another tenant's.
        """
        if entry.id != id:
            raise BankError(f'update of "{id}": the entry\'s id is "{entry.id}"; give the same', id)
        return writing.add(self, [entry], update=True)[0]

    def fill(self, ref: str, block: MemoryBlock) -> None:
        """Give a cold entry its block, once. Raises UnknownEntryError, and BankError if it has one."""
        writing.fill(self, {ref: block})

    def fill_all(self, blocks: Mapping[str, MemoryBlock]) -> None:
        """Fill many references in one transaction, see ``fill``."""
        writing.fill(self, blocks)

    def delete(self, id_or_ref: str, tenant: str | None = None) -> None:
        """Hide an entry with all its versions, or one version alone. Numbers of versions are never given twice.

        If the one version was the newest, the id names the newest one that is left. tenant: refuse what is not this
        tenant's own.
        """
        self.reserve.run(lambda: writing.delete(self, id_or_ref, tenant))

    def set_sink(self, block: MemoryBlock) -> None:
        """Store the constant prefix, in all layers of the model. Only before there are entries, or the same again."""
        writing.set_sink(self, block)

    # Reading.

    def knows(self, id_or_ref: str, tenant: str = "") -> bool:
        """Return whether ``resolve`` would find it."""
        try:
            self.resolve(id_or_ref, tenant)
            return True
        except UnknownEntryError:
            return False

    def has_known(self, id_or_ref: str) -> bool:
        """Return whether there ever was an entry of this id, deleted or not."""
        return bool(self.catalogue.read("SELECT 1 FROM ids WHERE id = ?", split_ref(id_or_ref)[0]))

    def token_ids(self, ref: str) -> list[int] | None:
        """Return the tokens that an entry was written with, if they were given."""
        row = self.catalogue.find(ref, "token_ids")
        if row is None:
            raise UnknownEntryError(ref)
        return None if row[0] is None else writing.unpack_ids(row[0])

    def load(
        self,
        ref: str,
        layers: Sequence[int] | None = None,
        heads: slice | None = None,
        dtype: torch.dtype | None = None,
        deleted: bool = False,
    ) -> MemoryBlock:
        """Load an entry's block, or the part of it in some layers and KV heads; no more is loaded than that.

        layers: indices of the model's layers, in any order. dtype: None for the bank's. deleted: a version that was
        deleted may be read until ``compact`` drops it, for requests that were admitted before.
        Raises UnknownEntryError, and BankError for a cold entry, a layer that the bank has not, or a damaged shard.
        """
        with self.reading(ref, layers, heads, dtype, deleted) as block:
            return block

    @contextmanager
    def reading(
        self,
        ref: str,
        layers: Sequence[int] | None = None,
        heads: slice | None = None,
        dtype: torch.dtype | None = None,
        deleted: bool = False,
    ) -> Iterator[MemoryBlock]:
        """Give what ``load`` gives, and compare it with its checksums at the end of the with block.

        By then it has been read once and lies in the processor's cache, where the comparison costs a fraction. Nothing
        that was made of it may be used before the end. Arguments and errors as for ``load``; damage is raised instead
        of what it led to. Example::

            with bank.reading("mara@1") as block:
                records = layout.pack(place(block, ropes, "prefix", 0))
            pool.write(pages, records)
        """
        stored = self._open_row(ref, self._stored_layers(layers), self._heads(heads), deleted)
        try:
            yield stored.decode(self.shards.codec, dtype or self.spec.torch_dtype)
        finally:
            stored.compare()

    def _open_row(self, ref: str, layers: Sequence[int] | None, heads: slice, deleted: bool) -> StoredRow:
        for attempt in range(3):
            name = "(SELECT name FROM shards s WHERE s.shard = entries.shard)"
            row = self.catalogue.find(ref, f"shard, row, {name}", deleted)
            if row is None:
                raise UnknownEntryError(ref)
            if row[0] is None:
                raise BankError(f'"{ref}" has text but no keys and values yet; fill it first', ref)
            try:
                return self.shards.open_row(row[2], row[1], layers, heads, ref)
            except FileNotFoundError as error:  # compact may have moved it since the catalogue was read
                if attempt == 2:
                    raise BankError(f'"{ref}": {error} is missing; restore it from a backup', ref) from None
            except BankError as error:
                raise BankError(f'"{ref}": {error}', ref) from None
        raise AssertionError("unreachable")

    def list(
        self, tenant: str | None = None, after: str | None = None, limit: int = 100, only_cold: bool = False
    ) -> list[EntryInfo]:
        """Current entries by id, those behind the id ``after``. tenant: None for all, else its own and everybody's.

        Example::

            page = bank.list()
            while page:
                page = bank.list(after=page[-1].id)
        """
        if not 1 <= limit < 1 << 62:
            raise BankError(f"limit: {limit}, expected at least 1, and a number that SQLite takes")
        return self.catalogue.page(tenant, after or "", limit, only_cold)

    def search(
        self, text: str, top_k: int, tenant: str = "", source: str | None = None, only_filled: bool = False
    ) -> list[Hit]:
        """Find the entries nearest in meaning that ``tenant`` may see, best first. only_filled: none that are cold."""
        if top_k < 1:
            raise BankError(f"top_k: {top_k}, expected at least 1")
        if self.catalogue.meta("dim") is None:  # nothing was ever written
            return []
        query = self.embedder.embed([text.encode(errors="replace").decode()])[0]  # half a surrogate pair is no text
        tenants = ("",) if tenant == "" else ("", tenant)
        return self.vectors.search(query, top_k, tenants, source, only_filled)

    def find_hash(self, content_hash: str, tenant: str = "") -> str | None:
        """Find the current version with this content: the tenant's own, else everybody's."""
        try:
            digest = bytes.fromhex(content_hash)
        except ValueError:
            return None
        rows = self.catalogue.read(
            "SELECT id || '@' || version FROM entries WHERE state = 0 AND content_hash = ? AND tenant IN ('', ?) "
            "ORDER BY tenant = ? DESC, seq DESC LIMIT 1",
            digest,
            tenant,
            tenant,
        )
        return rows[0][0] if rows else None

    # Keeping it in order.

    def verify(self) -> list[str]:
        """Problems found in shards, catalogue and index, each naming its file or reference; empty if all is well."""
        return maintenance.verify(self)

    def compact(self) -> dict[str, int]:
        """Drop deleted and superseded versions and orphaned files; how many. Readers go on with what they hold."""
        return maintenance.compact(self)

    def export(self, destination: str | Path, ids: Sequence[str] | None = None, tenant: str | None = None) -> list[str]:
        """Write entries with their versions to a new bank, or to a tar of one if the name ends in .tar; references.

        ids: None for all. tenant: None for all, else what it may see. Raises UnknownEntryError, ForeignTenantError.
        """
        return transfer.export(self, Path(destination), ids, tenant)

    def import_from(self, source: str | Path) -> list[str]:
        """Add what ``export`` wrote, under the same references; what is here already is skipped.

        Raises BankError for a bank of another model or form, and for a reference that means something else here.
        """
        return transfer.import_from(self, Path(source))

    def stats(self) -> dict[str, Any]:
        """Numbers of entries, versions, tenants and shards, and bytes on the disk."""
        return maintenance.stats(self)

    def _stored_layers(self, layers: Sequence[int] | None) -> list[int] | None:
        if layers is None:
            return None
        for layer in layers:
            if layer not in self.spec.layers:
                raise BankError(f"layer {layer} is not in {self.path}, which has {_short(self.spec.layers)}")
        return None if list(layers) == list(self.spec.layers) else [self.spec.layers.index(layer) for layer in layers]

    def _heads(self, heads: slice | None) -> slice:
        heads = heads or slice(None)
        first, end, step = heads.indices(self.spec.kv_heads)
        if step != 1 or first >= end or (heads.stop or 0) > self.spec.kv_heads:
            raise BankError(
                f"heads {heads}: {self.path} has KV heads 0 to {self.spec.kv_heads - 1}; give a plain slice"
            )
        return slice(first, end)


def _short(layers: Sequence[int]) -> str:
    spans = [(first, end) for first, end in runs(layers)]
    return "layers " + ", ".join(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in spans)
