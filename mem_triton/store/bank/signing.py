"""Digests of a catalogue's rows: written by triggers with every change, looked at whenever a row is read.

They lie in a table of their own, so that a row of an earlier version, which has none, is read as it was; ``unsigned``
in ``meta`` is the last row that may have none. A change of a row that is damaged leaves its digest as it was: what is
wrong stays known to be wrong.
"""

from __future__ import annotations

import sqlite3
import zlib
from typing import Any

from mem_triton.store.bank.checksums import row_digest
from mem_triton.store.errors import BankError

TABLE = "digests (seq INTEGER PRIMARY KEY, entry BLOB, vector INTEGER)"
SIGNED = (
    "row_digest({0}seq, {0}id, {0}version, {0}tenant, {0}state, {0}tokens, (SELECT s.name FROM shards s WHERE "
    "s.shard = {0}shard), {0}row, {0}created, {0}content_hash, {0}source, {0}metadata, {0}text, {0}token_ids)"
)
_STORED = "(SELECT d.entry FROM digests d WHERE d.seq = {0}seq)"
_UNSIGNED = "(SELECT value FROM meta WHERE key = 'unsigned')"
_MAY_LACK = f"coalesce({{0}}seq <= {_UNSIGNED}, 1)"
_MATCHES = f"coalesce({_STORED} = {SIGNED}, {_MAY_LACK})"
INTACT = _MATCHES.format("entries.")
"""1 if a row of ``entries`` is as it was written, 0 if not."""
VECTOR = (
    "v.seq, v.vector, coalesce((SELECT d.vector FROM digests d WHERE d.seq = v.seq), "
    f"CASE WHEN NOT {_MAY_LACK.format('v.')} THEN -2 END)"
)
"""Columns of ``vectors v`` for ``check_vectors``."""
SEALED = ("bank", "codec_state", "sink", "spec", "dim", "features", "unsigned")
"""Keys of ``meta`` that have a digest beside them, under "digest:KEY"."""
_DIGEST = "(SELECT value FROM meta WHERE key = 'digest:' || m.key)"
FACT = f"m.value, coalesce({_DIGEST} = row_digest(m.value), m.key NOT IN {SEALED} OR {_UNSIGNED} IS NULL)"
"""A value of ``meta m``, and 1 if it is as it was written."""

_KEEP = "ON CONFLICT (seq) DO UPDATE SET"
_VECTOR = "INSERT INTO digests (seq, vector) VALUES (NEW.seq, vector_digest(NEW.seq, NEW.vector)) "
_VECTOR += f"{_KEEP} vector = excluded.vector"
TRIGGERS = (
    "sign_entry AFTER INSERT ON main.entries BEGIN INSERT INTO digests (seq, entry) "
    f"VALUES (NEW.seq, {SIGNED.format('NEW.')}) {_KEEP} entry = excluded.entry; END",
    "sign_change AFTER UPDATE ON main.entries BEGIN INSERT INTO digests (seq, entry) VALUES (NEW.seq, CASE WHEN "
    f"{_MATCHES.format('OLD.')} THEN {SIGNED.format('NEW.')} ELSE {_STORED.format('OLD.')} END) {_KEEP} entry = "
    "excluded.entry; DELETE FROM digests WHERE seq = OLD.seq AND OLD.seq != NEW.seq; END",
    "drop_entry AFTER DELETE ON main.entries BEGIN DELETE FROM digests WHERE seq = OLD.seq; END",
    f"sign_vector AFTER INSERT ON main.vectors BEGIN {_VECTOR}; END",
    f"move_vector AFTER UPDATE ON main.vectors BEGIN {_VECTOR}; END",
    f"sign_fact AFTER INSERT ON main.meta WHEN NEW.key IN {SEALED} BEGIN INSERT OR REPLACE INTO meta VALUES "
    "('digest:' || NEW.key, row_digest(NEW.value)); END",
)


def prepare(db: sqlite3.Connection, writable: bool) -> None:
    """Give a connection the functions, and the writer's the triggers; a bank of an earlier version gets the table."""
    db.create_function("row_digest", -1, row_digest, deterministic=True)
    db.create_function("vector_digest", 2, vector_digest, deterministic=True)
    if writable:
        db.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}")
        for trigger in TRIGGERS:
            db.execute(f"CREATE TEMP TRIGGER {trigger}")
        if not db.execute("SELECT 1 FROM meta WHERE key = 'unsigned'").fetchone():
            _sign_the_rest(db)
    elif not db.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'digests'").fetchone():
        db.execute(f"CREATE TEMP TABLE {TABLE}")


def _sign_the_rest(db: sqlite3.Connection) -> None:
    """Sign the facts of a bank of an earlier version and keep which rows have no digest. A full disk puts it off."""
    outer = db.in_transaction
    try:
        db.execute("SAVEPOINT sign_the_rest")
        db.execute(
            f"INSERT INTO meta SELECT 'digest:' || m.key, row_digest(m.value) FROM meta m WHERE m.key IN {SEALED} "
            f"AND {_DIGEST} IS NULL"
        )
        unsigned = (
            "SELECT seq FROM entries LEFT JOIN digests d USING (seq) LEFT JOIN vectors v USING (seq) "
            "WHERE d.entry IS NULL OR v.vector IS NOT NULL AND d.vector IS NULL"
        )
        db.execute(f"INSERT INTO meta SELECT 'unsigned', coalesce(max(seq), 0) FROM ({unsigned})")
        db.execute("RELEASE sign_the_rest")
    except sqlite3.OperationalError as error:
        if outer or error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise
        if db.in_transaction:
            db.execute("ROLLBACK")


def vector_digest(seq: Any, vector: Any) -> int:
    """32 bits of a row of ``vectors``; cheap, since a search without a graph looks at every one."""
    return zlib.crc32(vector, int(seq) & 0xFFFFFFFF) if isinstance(vector, bytes) else -1


def check_vectors(path: Any, rows: list[tuple], dim: int | None) -> None:
    """Raises BankError if one of (..., seq, vector, digest) is not as it was written."""
    for *_, seq, vector, digest in rows:
        right = isinstance(vector, bytes) and len(vector) == 2 * (dim or 0)
        if not right or (digest is not None and digest != vector_digest(seq, vector)):
            raise damaged(path, f"the vector of row {seq} has")


def damaged(path: Any, what: str, entry: str | None = None) -> BankError:
    """The error for a part of a catalogue that is not as it was written."""
    return BankError(
        f"{path}: {what} changed since it was written; run `mem-triton bank verify`, and restore the bank from a "
        "backup, or delete the entry and write it again",
        entry,
    )
