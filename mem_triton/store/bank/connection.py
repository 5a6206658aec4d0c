"""Connections to a catalogue: the writer's, and a reader's wherever it may read, if it may write nothing at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from mem_triton.store.bank import signing
from mem_triton.store.errors import BankError, BankFullError

CHECKED_AT_ONCE = 4 << 20
"""Bytes of a catalogue whose structure is checked when it is opened, which takes some milliseconds."""
_NO_WRITING = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
Stamp = tuple[tuple[int, int, int] | None, ...]


class Connection(NamedTuple):
    """db: SQLite's. stamp: of the files as they are read without a lock, None if SQLite locks them.

    copied: a folder with a copy that is read instead.
    """

    db: sqlite3.Connection
    stamp: Stamp | None = None
    copied: tempfile.TemporaryDirectory | None = None

    def close(self) -> None:
        """Close it, and remove what was made for it."""
        self.db.close()
        if self.copied is not None:
            self.copied.cleanup()


def connect(path: Path, writable: bool) -> Connection:
    """Open a catalogue. Raises BankError, BankFullError for a writer that finds no room.

    SQLite keeps files beside a catalogue that somebody writes. A reader that may not make them reads a catalogue that
    nobody writes as it lies there, and asks before each query whether it still lies so (``stamp``); one with commits
    that a dead writer left beside it is read as a copy.
    """
    if not path.exists():
        raise BankError(f"{path} is missing; restore it, a bank is nothing without its catalogue")
    try:
        if writable:
            return Connection(_opened(path, "mode=rw", writable=True))
        for mode in ("mode=rw", "mode=ro"):
            try:
                return Connection(_opened(path, mode))
            except sqlite3.OperationalError as error:
                if _code(error) not in _NO_WRITING:
                    raise
        stamp = stamp_of(path)
        if stamp[1] is None or stamp[1][1] == 0:  # no log, or an empty one
            return Connection(_opened(path, "mode=ro&immutable=1"), stamp)
        folder = tempfile.TemporaryDirectory(prefix="mem_triton-")
        for name in (path.name, f"{path.name}-wal"):
            shutil.copyfile(path.with_name(name), Path(folder.name) / name)
        return Connection(_opened(Path(folder.name) / path.name, "mode=rw"), stamp, folder)
    except (sqlite3.Error, UnicodeError, OSError) as error:
        raise refused(path, error, "is it a bank's catalogue, and may you read its folder?") from None


def stamp_of(path: Path) -> Stamp:
    """Return what every write to a catalogue changes: inode, length and time of it and of its log."""
    found: list[tuple[int, int, int] | None] = []
    for name in (path, path.with_name(f"{path.name}-wal")):
        try:
            stat = os.stat(name)
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def refused(path: Path, error: Exception, hint: str) -> BankError:
    """What to raise for SQLite's error."""
    text = " ".join(f"{path}: {error}; {hint}".split())
    code = _code(error)
    no_room = code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _free_bytes(path) < 1 << 16
    return BankFullError(text) if code == sqlite3.SQLITE_FULL or no_room else BankError(text)


def _opened(path: Path, mode: str, writable: bool = False) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA busy_timeout = 20000")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA temp_store = MEMORY")
        if writable:
            db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            db.execute("PRAGMA cache_size = -131072")
        db.execute("SELECT 1 FROM meta").fetchone()
        signing.prepare(db, writable)
        if not writable:
            db.execute("PRAGMA query_only = ON")
        _check_structure(db, path)
        return db
    except BaseException:
        db.close()
        raise


def _check_structure(db: sqlite3.Connection, path: Path) -> None:
    """Raises BankError for a damaged catalogue, if it is small; a large one is checked by ``verify``."""
    if path.stat().st_size <= CHECKED_AT_ONCE:
        ((problem,),) = db.execute("PRAGMA integrity_check(1)").fetchall()
        if problem != "ok":
            raise BankError(f"{path} is damaged: {' '.join(problem.split())}; restore it from a backup")


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path.parent)
        return stat.f_bavail * stat.f_frsize
    except OSError:
        return 1 << 62
