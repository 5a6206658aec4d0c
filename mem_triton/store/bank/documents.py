"""Entries by the document that they are of: its references in their order, and all that came from a file.

The write path gives a reference the id "<name of its document>:<12 hex digits of its content>" and its place in the
document as ``metadata["start"]``. So an edited document keeps the ids of the references that did not change, and its
order is that of its last write.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mem_triton import ids
from mem_triton.store.bank.captured import EVERYBODY
from mem_triton.store.bank.catalogue import INFO, entry_info
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.spec import EntryInfo
from mem_triton.store.bank.writing import writer
from mem_triton.store.errors import BankError, UnknownEntryError

LONGEST_NAME = 100
"""Characters of a document's name in the ids of its references; a longer one is shortened."""
_DIGEST = re.compile(r"[0-9a-f]{12}")
_LINE = re.compile(r":[0-9]+\Z")


def reference_id(name: str, digest: str) -> str:
    """Id of a reference of the document ``name``. digest: hexadecimal, of what makes it itself."""
    return f"{ids.shortened(name, LONGEST_NAME)}:{digest[:12]}"


def references(bank: OpenedBank, name: str, tenant: str | None = None) -> list[EntryInfo]:
    """Current references of a document, in its order. tenant: None for all, else its own and everybody's."""
    start = ids.shortened(name, LONGEST_NAME) + ":"
    rows = bank.catalogue.read(
        f"SELECT {INFO} FROM entries WHERE state = 0 AND id >= ? AND id < ?", start, start[:-1] + ";"
    )
    found = [entry_info(row) for row in rows]
    found = [
        info
        for info in found
        if _DIGEST.fullmatch(info.id, len(start)) and (tenant is None or info.tenant in ("", tenant))
    ]
    return in_order(found)


def in_order(entries: Iterable[EntryInfo]) -> list[EntryInfo]:
    """Entries as their files have them: by file, line and place in the text."""
    return sorted(entries, key=lambda info: (file_of(info.source), _line(info.source), _start(info), info.id))


def resolve_all(bank: OpenedBank, word: str, tenant: str = "", any_tenant: bool = False) -> list[EntryInfo]:
    """What "id", "id@version", "document", "document#0", "document#2-5" or "document#*" names, in order.

    Raises UnknownEntryError, ForeignTenantError, and BankError for places that the document does not have.
    """
    places = ids.split_places(word)
    if places is None:
        try:
            return [bank.resolve(word, tenant=tenant, any_tenant=any_tenant)]
        except UnknownEntryError:
            if found := references(bank, word, None if any_tenant else tenant):
                return found  # no entry is called so, but a document
            raise
    name, first, end = places
    found = references(bank, name, None if any_tenant else tenant)
    if not found:
        raise UnknownEntryError(word)
    if len(found) < (end or 0):
        raise BankError(f'"{word}": "{name}" has {len(found)} references, #0 to #{len(found) - 1}', word)
    return found[first:end]


def file_of(source: str) -> str:
    """The file of a source: that of "facts.jsonl:12" is "facts.jsonl"."""
    return _LINE.sub("", source)


def spellings(path: str | Path) -> list[str]:
    """How a file may be written as a source: as given, absolute, and from the current folder."""
    given = str(path)
    return list(dict.fromkeys((given, os.path.abspath(given), os.path.relpath(given))))


def of_source(bank: OpenedBank, source: str | Path, tenant: str | None = None) -> list[EntryInfo]:
    """Current entries of a file, those of its lines included, however its path was written. tenant: None for all."""
    found: dict[str, EntryInfo] = {}
    whose = "" if tenant is None else "AND tenant = ?"
    for name in spellings(source):
        rows = bank.catalogue.read(
            f"SELECT {INFO} FROM entries WHERE state = 0 AND (source = ? OR source >= ? AND source < ?) {whose}",
            name,
            f"{name}:",
            f"{name};",
            *([] if tenant is None else [tenant]),
        )
        infos = [entry_info(row) for row in rows]
        found |= {info.ref: info for info in infos if name in (info.source, file_of(info.source))}
    return list(found.values())


def sources(bank: OpenedBank, tenant: str | None = None) -> list[str]:
    """Files that current entries are of, each once. tenant: None for all, else its own alone."""
    whose = "" if tenant is None else "AND tenant = ?"
    rows = bank.catalogue.read(
        f"SELECT DISTINCT source FROM entries WHERE state = 0 {whose}", *([] if tenant is None else [tenant])
    )
    return list(dict.fromkeys(file_of(source) for (source,) in rows if source))


@writer
def describe(bank: OpenedBank, where: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    """Say anew where entries are from: reference -> (source, metadata). What they mean stays as it is."""
    with bank.catalogue.write() as db:
        db.executemany(
            "UPDATE entries SET source = ?, metadata = ? WHERE seq = ?",
            [
                (source, json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False), *bank.catalogue.find(ref))
                for ref, (source, metadata) in where.items()
            ],
        )


def unnameable(entries: Iterable[EntryInfo]) -> tuple[list[str], list[str]]:
    """(ids, tenants) among entries that no request can name: those of banks older than the grammar of ids."""
    entries = list(entries)
    old = [entry.id for entry in entries if not ids.is_id(entry.id)]
    others = [e.tenant for e in entries if e.tenant not in ("", EVERYBODY) and not ids.is_name(e.tenant)]
    return old, list(dict.fromkeys(others))


def _line(source: str) -> int:
    match = _LINE.search(source)
    return int(match.group()[1:]) if match else 0


def _start(info: EntryInfo) -> int:
    start = info.metadata.get("start")
    return start if isinstance(start, int) else 0
