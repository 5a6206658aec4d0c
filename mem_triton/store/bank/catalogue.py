"""The catalogue of a bank, in SQLite. It alone decides what exists; docs/bank-format.md describes the tables."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mem_triton import ids
from mem_triton.store.bank import signing
from mem_triton.store.bank.connection import Connection, connect, refused, stamp_of
from mem_triton.store.bank.spec import EntryInfo, split_ref
from mem_triton.store.errors import BankError, UnknownEntryError

CURRENT, SUPERSEDED, DELETED = 0, 1, 2

TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE ids (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, last_version INTEGER NOT NULL, current INTEGER
) WITHOUT ROWID;
CREATE TABLE shards (shard INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, bytes INTEGER, sha256 TEXT);
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, version INTEGER NOT NULL, tenant TEXT NOT NULL,
    state INTEGER NOT NULL, tokens INTEGER NOT NULL, shard INTEGER, row INTEGER, created REAL NOT NULL,
    content_hash BLOB NOT NULL, source TEXT NOT NULL, metadata TEXT NOT NULL, text TEXT NOT NULL, token_ids BLOB,
    UNIQUE (id, version)
);
CREATE TABLE vectors (seq INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE index_files (tenant TEXT PRIMARY KEY, name TEXT, digest TEXT, through INTEGER, count INTEGER);
CREATE TABLE {signing.TABLE};
CREATE INDEX current_by_tenant ON entries (tenant, id) WHERE state = 0;
CREATE INDEX current_by_age ON entries (tenant) WHERE state = 0;
CREATE INDEX current_by_source ON entries (source, tenant) WHERE state = 0;
CREATE INDEX current_by_hash ON entries (content_hash) WHERE state = 0;
CREATE INDEX cold ON entries (id) WHERE state = 0 AND shard IS NULL;
CREATE INDEX by_shard ON entries (shard) WHERE shard IS NOT NULL;
"""
INFO = (
    f"id, version, tokens, shard IS NOT NULL, text, source, metadata, tenant, created, content_hash, {signing.INTACT}"
)


class Catalogue:
    """One SQLite connection, shared by the threads of a process; a forked child gets its own. Raises BankError."""

    def __init__(self, path: Path, writable: bool) -> None:
        self.path, self.writable = path, writable
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._inherited: Connection | None = None
        self._pid = 0
        try:
            self.read("SELECT value FROM meta WHERE key = 'revision'")
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, meta: dict[str, Any]) -> Catalogue:
        """An empty catalogue. meta: facts about the bank."""
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.executescript(f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; BEGIN; {TABLES}")
            signing.prepare(db, writable=True)
            db.executemany("INSERT INTO meta VALUES (?, ?)", [("revision", 0), *meta.items()])
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise refused(path, error, "nothing was made") from None
        finally:
            db.close()
        return cls(path, writable=True)

    @property
    def db(self) -> sqlite3.Connection:
        """This process's connection."""
        if self._connection is None or self._pid != os.getpid():
            self._inherited = self._connection  # a fork's: kept, since to close it here would be to close the parent's
            self._connection, self._pid = connect(self.path, self.writable), os.getpid()
        return self._connection.db

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
                self._connection = None

    def read(self, sql: str, *parameters: Any) -> list[tuple]:
        """Rows of a query, as of the last commit."""
        with self._lock:
            try:
                while True:
                    rows, stamp = self.db.execute(sql, parameters).fetchall(), self._connection.stamp
                    if stamp is None or stamp == stamp_of(self.path):
                        return rows
                    self.close()  # somebody wrote what is read without a lock: look again
            except (sqlite3.Error, UnicodeError) as error:
                raise refused(self.path, error, "run `mem-triton bank verify`") from None

    @contextmanager
    def write(self, revise: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction: committed when the block ends, undone when it raises. revise: it is a new revision."""
        with self._lock:
            db = self.db
            try:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    if revise:
                        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'revision'")
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, UnicodeError) as error:
                raise refused(self.path, error, "nothing was changed") from None

    def meta(self, key: str) -> Any:
        """A fact about the bank, None if it is not known."""
        rows = self.read(f"SELECT {signing.FACT} FROM meta m WHERE key = ?", key)
        if rows and not rows[0][1]:
            raise signing.damaged(self.path, f"{key} has")
        return rows[0][0] if rows else None

    def find(self, id_or_ref: str, columns: str = "seq", deleted: bool = False, damaged: bool = False) -> tuple | None:
        """``columns`` of an entry; the newest version for an id. deleted: a version that was deleted is found, too.

        Raises BankError for a row that is not as it was written, unless ``damaged`` allows it.
        """
        id, version = split_ref(id_or_ref)
        select = f"SELECT {columns}, {signing.INTACT} FROM entries WHERE id = ? AND"
        if version is None:
            rows = self.read(f"{select} seq = (SELECT current FROM ids WHERE id = ?)", id, id)
        else:
            rows = self.read(f"{select} version = ? AND state < ?", id, version, 3 if deleted else 2)
        if rows and not (rows[0][-1] or damaged):
            raise signing.damaged(self.path, f'the row of "{id_or_ref}" has', id_or_ref)
        return rows[0][:-1] if rows else None

    def info(self, id_or_ref: str) -> EntryInfo:
        """Raises UnknownEntryError."""
        row = self.find(id_or_ref, INFO)
        if row is None:
            raise UnknownEntryError(id_or_ref)
        return entry_info(row)

    def page(self, tenant: str | None, after: str, limit: int, only_cold: bool) -> list[EntryInfo]:
        """Current entries by id behind ``after``."""
        cold = "AND shard IS NULL" if only_cold else ""
        one = f"SELECT {INFO} FROM entries WHERE state = 0 {cold} AND tenant = ? AND id > ? ORDER BY id LIMIT ?"
        if tenant is None:
            if only_cold:
                sql = f"SELECT {INFO} FROM entries WHERE state = 0 {cold} AND id > ? ORDER BY id LIMIT ?"
            else:
                page = "SELECT current FROM ids WHERE id > ? AND current IS NOT NULL ORDER BY id LIMIT ?"
                sql = f"SELECT {INFO} FROM entries WHERE seq IN ({page}) ORDER BY id"
            rows = self.read(sql, after, limit)
        elif tenant == "":
            rows = self.read(one, "", after, limit)
        else:  # two ordered lists, so that a page costs a page, however many entries others have
            sql = f"SELECT * FROM (SELECT * FROM ({one}) UNION ALL SELECT * FROM ({one})) ORDER BY id LIMIT ?"
            rows = self.read(sql, "", after, limit, tenant, after, limit, limit)
        return [entry_info(row) for row in rows]

    def accepted(
        self, seqs: Sequence[int], tenants: Sequence[str], source: str | None, only_filled: bool
    ) -> list[tuple[str, bytes]]:
        """(reference, vector) of those among ``seqs`` that are current, and that the tenants and filters allow."""
        rows: list[tuple] = []
        marks = ",".join("?" * len(tenants))
        filters = ("AND e.source = ?" if source is not None else "") + (
            " AND e.shard IS NOT NULL" if only_filled else ""
        )
        extra = [source] if source is not None else []
        for first in range(0, len(seqs), 500):
            part = [int(s) for s in seqs[first : first + 500]]
            rows += self.read(
                f"SELECT e.id || '@' || e.version, {signing.VECTOR} FROM entries e JOIN vectors v USING (seq) "
                f"WHERE e.seq IN ({','.join(map(str, part))}) AND e.state = 0 AND e.tenant IN ({marks}) {filters}",
                *tenants,
                *extra,
            )
        return [(ref, vector) for ref, _, vector, _ in self._checked(rows)]

    def matching(
        self, tenants: Sequence[str], source: str | None, only_filled: bool, size: int = 8192
    ) -> Iterator[list[tuple[str, bytes]]]:
        """Every current entry that the tenants and filters allow, in parts: (reference, vector)."""
        filled = "AND e.shard IS NOT NULL" if only_filled else ""
        by_source = "AND e.source = ?" if source is not None else ""
        extra = [source] if source is not None else []
        for tenant in tenants:
            last = 0
            while True:
                rows = self.read(
                    f"SELECT e.id || '@' || e.version, {signing.VECTOR} FROM entries e JOIN vectors v USING (seq) "
                    f"WHERE e.state = 0 AND e.tenant = ? {by_source} {filled} AND e.seq > ? ORDER BY e.seq LIMIT ?",
                    tenant,
                    *extra,
                    last,
                    size,
                )
                if not rows:
                    break
                last = rows[-1][1]
                yield [(ref, vector) for ref, _, vector, _ in self._checked(rows)]

    def vectors(self, tenant: str, behind: int, size: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(int64 seqs [n], float32 vectors [n, dim]) of a tenant's current entries behind ``behind``, in parts."""
        while True:
            rows = self.read(
                f"SELECT {signing.VECTOR} FROM entries e JOIN vectors v USING (seq) "
                "WHERE e.state = 0 AND e.tenant = ? AND e.seq > ? ORDER BY e.seq LIMIT ?",
                tenant,
                behind,
                size,
            )
            if not rows:
                return
            behind = rows[-1][0]
            yield np.array([row[0] for row in self._checked(rows)], np.int64), unpack(row[1] for row in rows)

    def _checked(self, rows: list[tuple]) -> list[tuple]:
        if rows:
            signing.check_vectors(self.path, rows, self.meta("dim"))
        return rows


def pack(vectors: np.ndarray) -> list[bytes]:
    """Vectors as the catalogue stores them: float16, little endian."""
    return [vector.tobytes() for vector in np.asarray(vectors, "<f2")]


def unpack(blobs: Iterable[bytes]) -> np.ndarray:
    """float32 [n, dim] of packed vectors."""
    blobs = list(blobs)
    return np.frombuffer(b"".join(blobs), "<f2").reshape(len(blobs), -1).astype(np.float32)


def entry_info(row: Sequence[Any]) -> EntryInfo:
    """Of a row with the columns INFO. Raises BankError if it is not what was written, or what no bank writes."""
    id, version, tokens, has_block, text, source, metadata, tenant, created, digest, intact = row
    ref = " ".join(f"{id}@{version}".split())[:200]
    if not intact:
        raise signing.damaged("catalogue.sqlite", f'the row of "{ref}" has', ref)
    try:
        right = ids.OLD_ID.fullmatch(id) and version > 0 and tokens >= 0 and len(digest) == 32
        right = right and all(isinstance(x, str) for x in (text, source)) and isinstance(created, float)
        right = right and len(tenant) <= 128 and tenant.isprintable()
        fields = json.loads(metadata)
    except (TypeError, ValueError, AttributeError, RecursionError):
        right, fields = False, None
    if not right or not isinstance(fields, dict):
        raise BankError(
            f'catalogue.sqlite: the row of "{ref}" is none that a bank writes; restore it from a backup', ref
        )
    return EntryInfo(ref, id, version, tokens, bool(has_block), text, source, fields, tenant, created, digest.hex())
