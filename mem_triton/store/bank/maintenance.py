"""Verify, compact and count: what keeps a bank in order. docs/bank-format.md says why compact may die at any point."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mem_triton.store.bank.catalogue import CURRENT, DELETED, SUPERSEDED
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.shards import MAX_ROWS, NAME, check_name, file_sha256
from mem_triton.store.bank.signing import INTACT
from mem_triton.store.bank.writing import register, writer
from mem_triton.store.errors import BankError, BankFullError
from mem_triton.store.files import WRITING

INCOMING = "incoming"
"""Folder of a bank where workers leave captures until the front end has made entries of them."""
INCOMING_AGE = 3600.0
"""Seconds after which a server that lives takes nothing any more that lies there: it does so in the same minute."""
SMALL_BYTES = 32 << 20
"""Shards below this are joined when there are several."""


def verify(bank: OpenedBank) -> list[str]:
    """``Bank.verify``."""
    return [*_check_shards(bank), *_check_catalogue(bank), *bank.vectors.problems(), *_check_folders(bank)]


def _check_folders(bank: OpenedBank) -> Iterator[str]:
    for name in ("shards", "index", INCOMING):
        if (bank.path / name).is_symlink():
            yield f"{bank.path / name} is a link: nothing behind it is ever removed; put a folder there"
    for path in _left_captures(bank):
        yield f"{path} is a capture that no server took ({path.lstat().st_size} bytes of a prompt); compact removes it"


def _check_shards(bank: OpenedBank) -> Iterator[str]:
    read = bank.catalogue.read
    for shard, name, size, digest in read("SELECT shard, name, bytes, sha256 FROM shards ORDER BY shard"):
        path = bank.shards.folder / name
        affected = [row[0] for row in read("SELECT id || '@' || version FROM entries WHERE shard = ?", shard)]
        whose = f" ({len(affected)} entries: {', '.join(affected[:3])}{', ...' if len(affected) > 3 else ''})"
        try:
            check_name(name, NAME, bank.shards.folder)
        except BankError as error:
            yield f"{error}{whose}"
            continue
        if path.is_symlink():
            yield f"{path} is a link{whose}; put the file there"
        elif not path.exists():
            yield f"{path} is missing{whose}"
        elif path.stat().st_size != size:
            yield f"{path} has {path.stat().st_size} bytes, expected {size}{whose}"
        elif file_sha256(path) != digest:
            yield f"{path} has changed since it was written{whose}"
        else:
            (last,) = read("SELECT max(row) FROM entries WHERE shard = ?", shard)[0]
            try:
                if last is not None and last >= 0:
                    bank.shards.raw(name, last)
            except BankError as error:
                yield str(error)


def _check_catalogue(bank: OpenedBank) -> Iterator[str]:
    read = bank.catalogue.read
    for (problem,) in read("PRAGMA quick_check"):
        if problem != "ok":
            yield f"{bank.catalogue.path}: {problem}"
    dim = bank.catalogue.meta("dim") or 0
    for what, sql in (
        ("lies in an unknown shard", "shard IS NOT NULL AND shard NOT IN (SELECT shard FROM shards)"),
        ("has no vector", f"seq NOT IN (SELECT seq FROM vectors WHERE length(vector) = {2 * dim})"),
        ("is not what its id names", "state = 0 AND seq NOT IN (SELECT current FROM ids WHERE ids.id = entries.id)"),
        ("is newer than its id's last version", "version > (SELECT last_version FROM ids WHERE ids.id = entries.id)"),
        ("has another tenant than its id", "tenant != (SELECT tenant FROM ids WHERE ids.id = entries.id)"),
    ):
        for (ref,) in read(f"SELECT id || '@' || version FROM entries WHERE {sql} LIMIT 100"):
            yield f'{bank.catalogue.path}: "{ref}" {what}'
    for (ref,) in read(f"SELECT id || '@' || version FROM entries WHERE NOT {INTACT} LIMIT 100"):
        yield f'{bank.catalogue.path}: the row of "{ref}" has changed since it was written'
    for (seq,) in read(
        "SELECT v.seq FROM vectors v JOIN digests d USING (seq) "
        "WHERE vector_digest(v.seq, v.vector) != d.vector LIMIT 100"
    ):
        yield f"{bank.catalogue.path}: the vector of row {seq} has changed since it was written"
    for (id,) in read(
        f"SELECT id FROM ids WHERE current NOT IN (SELECT seq FROM entries WHERE state = {CURRENT}) LIMIT 100"
    ):
        yield f'{bank.catalogue.path}: "{id}" names a version that is not there'


@writer
def compact(bank: OpenedBank) -> dict[str, int]:
    """``Bank.compact``.

    What needs no room comes first: orphans, then versions and whole shards that go. On a full disk the room that this
    frees is what the shards that are written anew then have, one after the other if not all of them fit.
    """
    files = remove_orphans(bank)
    stale, small = _to_rewrite(bank)
    dropped, gone = bank.reserve.run(lambda: _drop(bank))
    files += remove_orphans(bank)
    stale = [shard for shard in stale if shard not in gone]
    rewritten = stale + (small if len(small) > 1 else [])
    if not _fits(bank, rewritten):  # not all at once; small ones would free nothing
        rewritten = stale
        for shard in rewritten:
            bank.reserve.run(lambda shard=shard: _rewrite(bank, [shard]))
            files += remove_orphans(bank)
    bank.vectors.prune()
    files += remove_orphans(bank)  # last: until the commit they were somebody's
    bank.catalogue.read("PRAGMA incremental_vacuum")
    bank.reserve.fill()
    return {"versions": dropped, "shards": len(rewritten) + len(gone), "files": files}


def _to_rewrite(bank: OpenedBank) -> tuple[list[int], list[int]]:
    """Shards that hold what goes, and those that are small and whole."""
    stale, small = [], []
    for shard, size, current, rows in bank.catalogue.read(
        "SELECT s.shard, s.bytes, coalesce(sum(e.state = 0), 0), count(e.seq) FROM shards s "
        "LEFT JOIN entries e ON e.shard = s.shard GROUP BY s.shard ORDER BY s.shard"
    ):
        if rows == 0 and shard == _sink_shard(bank):
            continue
        if current < rows or rows == 0:
            stale.append(shard)
        elif size < SMALL_BYTES and rows < MAX_ROWS // 2:
            small.append(shard)
    return stale, small


def _drop(bank: OpenedBank) -> tuple[int, set[int]]:
    """Drop versions that are not current, and shards in which nothing is left; (how many versions, which shards)."""
    read = bank.catalogue.read
    (dropped,) = read("SELECT count(*) FROM entries WHERE state != 0")[0]
    unused = f"shard NOT IN (SELECT shard FROM entries WHERE shard IS NOT NULL AND state = {CURRENT})"
    gone = {shard for (shard,) in read(f"SELECT shard FROM shards WHERE {unused}")} - {_sink_shard(bank)}
    if dropped or gone:
        with bank.catalogue.write() as db:
            db.execute("DELETE FROM vectors WHERE seq IN (SELECT seq FROM entries WHERE state != 0)")
            db.execute("DELETE FROM entries WHERE state != 0")
            db.executemany("DELETE FROM shards WHERE shard = ?", [(shard,) for shard in gone])
    return dropped, gone


def _fits(bank: OpenedBank, shards: list[int]) -> bool:
    """Rewrite shards together, if there is room. What did not fit is let go of when this returns."""
    try:
        bank.reserve.run(lambda: _rewrite(bank, shards))
        return True
    except BankFullError:
        return False


def _rewrite(bank: OpenedBank, shards: list[int]) -> None:
    """Put the rows of some shards into new ones."""
    marks = ",".join(map(str, shards))
    moved = bank.catalogue.read(
        "SELECT e.seq, s.name, e.row FROM entries e JOIN shards s ON s.shard = e.shard "
        f"WHERE e.state = 0 AND e.shard IN ({marks}) ORDER BY e.shard, e.row"
    )
    if not moved:
        return
    try:
        written = list(bank.shards.write(bank.shards.raw(name, row) for _, name, row in moved))
        with bank.catalogue.write() as db:
            places = register(db, written)
            db.executemany(
                "UPDATE entries SET shard = ?, row = ? WHERE seq = ?",
                [(*place, seq) for place, (seq, _, _) in zip(places, moved, strict=True)],
            )
            db.execute(f"DELETE FROM shards WHERE shard IN ({marks})")
    except BankFullError:
        remove_orphans(bank)  # what did fit before it did not
        raise
    except FileNotFoundError as error:
        raise BankError(
            f"{error} is missing; restore it from a backup, or delete its entries (`verify` names them)"
        ) from None


def find_orphans(bank: OpenedBank) -> list[Path]:
    """Files that nothing refers to: left by a writer that died, by compact, or by a capture that was given up.

    Only what a bank names so itself is one, and nothing behind a link.
    """
    read = bank.catalogue.read
    known = {row[0] for row in read("SELECT name FROM shards UNION SELECT name FROM index_files")}
    found = []
    for folder, ending in (("shards", ".safetensors"), ("index", ".usearch")):
        ours = [path for path in _inside(bank.path / folder) if path.name.endswith(ending) or _unfinished(path)]
        found += [path for path in ours if path.name not in known]
    unfinished = [path for path in _inside(bank.path, folders=True) if _unfinished(path)]
    return found + unfinished + _left_captures(bank)


def remove_orphans(bank: OpenedBank) -> int:
    """Remove them; how many. A link goes itself, and nothing behind it."""
    orphans = find_orphans(bank)
    for path in orphans:
        bank.shards.forget(path.name)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return len(orphans)


def _unfinished(path: Path) -> bool:
    return path.name.startswith((WRITING, ".importing-"))


def _inside(folder: Path, folders: bool = False) -> list[Path]:
    """Files and links in a folder; none if it is a link or not there. folders: folders in it, too."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if folders or path.is_symlink() or not path.is_dir()]


def _left_captures(bank: OpenedBank) -> list[Path]:
    """List files in ``incoming`` that no server writes or will take: all while none runs, else those that are old.

    A server that captures holds a shared lock on the folder for as long as it lives (``systems.explicit.captures``).
    """
    files = _inside(bank.path / INCOMING)
    young = time.time() - INCOMING_AGE if files and _is_held(bank.path / INCOMING) else float("inf")
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a server has just taken it
            if path.lstat().st_mtime < young:
                found.append(path)
    return found


def _is_held(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:  # held, or a file system without locks: then age alone decides
        return True
    finally:
        os.close(handle)


def stats(bank: OpenedBank) -> dict[str, Any]:
    """``Bank.stats``."""
    read = bank.catalogue.read
    by_state = dict(read("SELECT state, count(*) FROM entries GROUP BY state"))
    cold, tokens = read("SELECT count(*) - count(shard), coalesce(sum(tokens), 0) FROM entries WHERE state = 0")[0]
    shards, shard_bytes = read("SELECT count(*), coalesce(sum(bytes), 0) FROM shards")[0]
    return {
        "entries": by_state.get(CURRENT, 0),
        "cold": cold,
        "superseded": by_state.get(SUPERSEDED, 0),
        "deleted": by_state.get(DELETED, 0),
        "tokens": tokens,
        "tenants": read("SELECT count(DISTINCT tenant) FROM ids WHERE current IS NOT NULL")[0][0],
        "shards": shards,
        "shard_bytes": shard_bytes,
        "catalogue_bytes": bank.catalogue.path.stat().st_size,
        "index_bytes": sum(path.lstat().st_size for path in _inside(bank.path / "index")),
        "orphans": len(find_orphans(bank)),
        "revision": bank.revision,
    }


def _sink_shard(bank: OpenedBank) -> int | None:
    sink = bank.catalogue.meta("sink")
    if sink is None:
        return None
    rows = bank.catalogue.read("SELECT shard FROM shards WHERE name = ?", json.loads(sink)["name"])
    return rows[0][0] if rows else None
