"""What a bank has already of the texts that are being written, and what a write takes out of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mem_triton.store.bank import Bank, EntryInfo, NewEntry
from mem_triton.store.bank.captured import is_captured
from mem_triton.store.bank.catalogue import INFO, entry_info
from mem_triton.store.bank.documents import file_of, of_source, sources, spellings
from mem_triton.store.bank.spec import EXACT_CODECS

"""Precision of a bank's blocks -> the codec that keeps every bit of them."""


@dataclass(frozen=True)
class Known:
    """What there is of a text. here: the entry that makes another one needless; copy: one that has the same block.

    obstacle: why the text cannot be written under its id.
    """

    here: EntryInfo | None = None
    copy: EntryInfo | None = None
    obstacle: str | None = None


def same_file(one: str, other: str) -> bool:
    """Whether two sources are one file, in whatever spelling; of lines of it, too."""
    first, second = file_of(one), file_of(other)
    return first == second or (bool(first and second) and not set(spellings(first)).isdisjoint(spellings(second)))


def look_up(bank: Bank, entry: NewEntry, digest: str, *, named: bool, replace: bool) -> Known:
    """What a bank has of an entry that is to be written.

    A reference is there already under its own id, under another one of the same file, or for everybody; a whole text
    under its own id alone, since its id is what requests name. digest: the entry's content hash. named: the id was
    chosen by somebody; one that was made of a file's name takes no other file's place unless ``replace`` says so.
    """
    rows = bank.catalogue.read(
        f"SELECT {INFO} FROM entries WHERE state = 0 AND content_hash = ? AND tenant IN ('', ?) ORDER BY seq",
        bytes.fromhex(digest),
        entry.tenant,
    )
    infos = [entry_info(row) for row in rows]
    exact = EXACT_CODECS.get(bank.spec.dtype) == bank.spec.codec
    copy = next((info for info in infos if info.has_block and exact), None)
    own = next((info for info in infos if info.id == entry.id), None)
    if bank.spec.kind != "prefix" and own is None:
        own = next((i for i in infos if i.tenant == entry.tenant and same_file(i.source, entry.source)), None)
        own = own or next((info for info in infos if info.tenant != entry.tenant), None)
    if own is not None:
        return Known(here=own)
    return Known(copy=copy, obstacle=_obstacle(bank, entry, named or replace))


def _obstacle(bank: Bank, entry: NewEntry, free: bool) -> str | None:
    if is_captured(entry.id):
        return f'id "{entry.id}": what begins so is kept for captures (mem_capture); choose another by --id'
    owner = bank.catalogue.read("SELECT tenant FROM ids WHERE id = ?", entry.id)
    if owner and owner[0][0] != entry.tenant:
        return f'id "{entry.id}" is another tenant\'s; choose another by --id'
    found = bank.catalogue.find(entry.id, INFO)
    if found is None or free:
        return None
    there = entry_info(found)
    if not there.source or same_file(there.source, entry.source):
        return None
    return (
        f'its id "{entry.id}" is that of {there.source}, which would be lost; write both in one run to tell them '
        "apart, choose an id by --id, or say --replace"
    )


def stale(bank: Bank, files: Iterable[str | Path], written: set[str], tenant: str) -> list[EntryInfo]:
    """A tenant's entries of ``files`` that are not among the ids that were ``written``: earlier contents of them."""
    return [info for file in files for info in of_source(bank, file, tenant) if info.id not in written]


def gone_files(bank: Bank, folders: Iterable[Path], tenant: str) -> list[str]:
    """Sources of a tenant's entries that were files under ``folders`` and are there no more."""
    roots = [folder.resolve() for folder in folders]
    return [
        source
        for source in sources(bank, tenant)
        if not (path := Path(source)).exists() and any(path.resolve().is_relative_to(root) for root in roots)
    ]
