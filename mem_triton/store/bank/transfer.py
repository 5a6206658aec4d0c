"""Entries from bank to bank, with their versions. An export is a bank itself, as a directory or a tar of one."""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mem_triton.store.bank.catalogue import CURRENT, INFO, SUPERSEDED, entry_info, pack, unpack
from mem_triton.store.bank.embedders import features_of
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.shards import Row
from mem_triton.store.bank.signing import VECTOR, check_vectors
from mem_triton.store.bank.spec import split_ref
from mem_triton.store.bank.writing import COLUMNS, check_block, register, same_block, set_sink, writer
from mem_triton.store.errors import BankError, BankModelError, ForeignTenantError, UnknownEntryError, not_written
from mem_triton.store.files import is_occupied, write_durably

MEMBER = re.compile(r"(\./)?(bank\.json|catalogue\.sqlite|(shards|index)(/[0-9a-f]{32}\.(safetensors|usearch))?)|\.")
"""What a tar of a bank may hold."""
BARE = re.compile(r"(\./)?(shards|index)|\.")


def export(bank: OpenedBank, destination: Path, ids: Sequence[str] | None, tenant: str | None) -> list[str]:
    """``Bank.export``."""
    if is_occupied(destination):
        raise BankError(f"{destination} is there already; choose another destination")
    seqs = _chosen(bank, ids, tenant)
    if destination.suffix != ".tar":
        made = not destination.exists()
        try:
            return _copy_to_new(bank, destination, seqs)
        except BaseException:
            if made:
                shutil.rmtree(destination, ignore_errors=True)
            raise
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".exporting-") as folder:
        refs = _copy_to_new(bank, Path(folder) / "bank", seqs)
        write_durably(destination, lambda temporary: _pack(Path(folder) / "bank", temporary))
    return refs


def import_from(bank: OpenedBank, source: Path) -> list[str]:
    """``Bank.import_from``."""
    if not source.is_file():
        for name in ("bank.json", "catalogue.sqlite", "shards", "index"):
            if (source / name).is_symlink():
                raise BankError(f"{source / name} is a link; what is imported lies in {source} itself: put it there")
        with OpenedBank.open(source) as other:
            return _merge(bank, other)
    with tempfile.TemporaryDirectory(dir=bank.path, prefix=".importing-") as folder:
        _unpack(source, Path(folder))
        with OpenedBank.open(folder) as other:
            return _merge(bank, other)


def _chosen(bank: OpenedBank, ids: Sequence[str] | None, tenant: str | None) -> list[int]:
    """The versions to export, oldest first."""
    if ids is None:
        mine = "" if tenant is None else "AND tenant IN ('', ?)"
        rows = bank.catalogue.read(
            f"SELECT seq FROM entries WHERE state < 2 {mine} ORDER BY seq", *([] if tenant is None else [tenant])
        )
        return [row[0] for row in rows]
    seqs = set()
    for id_or_ref in ids:
        id, version = split_ref(id_or_ref)
        rows = bank.catalogue.read("SELECT seq, tenant, version FROM entries WHERE id = ? AND state < 2", id)
        rows = [row for row in rows if version in (None, row[2])]
        if not rows:
            raise UnknownEntryError(id_or_ref)
        if tenant is not None and rows[0][1] not in ("", tenant):
            raise ForeignTenantError(id_or_ref)
        seqs |= {row[0] for row in rows}
    return sorted(seqs)


def _copy_to_new(bank: OpenedBank, destination: Path, seqs: list[int]) -> list[str]:
    with type(bank).create(destination, bank.spec, bank.catalogue.meta("codec_state")) as target:
        if (sink := bank.sink()) is not None:
            set_sink(target, sink)
        refs = _copy(bank, target, seqs, {})
        with target.catalogue.write() as db:  # an old version that was chosen alone is what its id names there
            newest = "SELECT max(seq) FROM entries e WHERE e.id = ids.id"
            db.execute(f"UPDATE ids SET current = ({newest}) WHERE current IS NULL")
            db.execute(f"UPDATE entries SET state = {CURRENT} WHERE seq IN (SELECT current FROM ids)")
        return refs


@writer
def _merge(bank: OpenedBank, other: OpenedBank) -> list[str]:
    """What ``other`` has and ``bank`` has not."""
    _check_alike(bank, other)
    seqs: list[int] = []
    fills: dict[int, int] = {}
    for seq, state, shard, digest, *row in other.catalogue.read(
        f"SELECT seq, state, shard, content_hash, {INFO} FROM entries WHERE state < 2 ORDER BY seq"
    ):
        info = entry_info(row)  # checks the row, too
        ref, id, version, tenant = info.ref, info.id, info.version, info.tenant
        owner = bank.catalogue.read("SELECT tenant, last_version FROM ids WHERE id = ?", id)
        if owner and owner[0][0] != tenant:
            raise BankError(f'"{ref}": its id belongs to another tenant here; import it into another bank', ref)
        here = bank.catalogue.find(ref, "seq, content_hash, shard")
        if here is None:
            if not owner or version > owner[0][1]:
                seqs.append(seq)
            elif state == CURRENT:
                raise BankError(f'"{ref}" was deleted or superseded here; import it into another bank', ref)
        elif here[1] != digest:
            raise BankError(f'"{ref}" is another text here; import it into another bank', ref)
        elif here[2] is None and shard is not None:
            fills[seq] = here[0]
    if (sink := other.sink()) is not None:
        set_sink(bank, sink)
    return _copy(other, bank, seqs, fills, foreign=True)


def _check_alike(bank: OpenedBank, other: OpenedBank) -> None:
    if differences := bank.spec.fingerprint.differences(other.spec.fingerprint):
        raise BankModelError(other.path, [d.replace("model has", "the import has") for d in differences])
    for name in type(bank.spec).model_fields:
        mine, theirs = getattr(bank.spec, name), getattr(other.spec, name)
        if name not in ("fingerprint", "embedder") and mine != theirs:
            raise BankError(f"{name}: {bank.path} has {mine}, the import has {theirs}; import it into another bank")
    if bank.catalogue.meta("codec_state") != other.catalogue.meta("codec_state"):
        raise BankError(f"codec {bank.spec.codec}: the import's was trained on other data; import it into another bank")
    if bank.catalogue.read("SELECT 1 FROM entries LIMIT 1"):
        mine, theirs = bank.sink(), other.sink()
        if (mine is None) != (theirs is None) or (mine is not None and not same_block(mine, theirs)):
            raise BankError("the constant prefix of the import is another; import it into another bank")


def _copy(
    source: OpenedBank, target: OpenedBank, seqs: list[int], fills: dict[int, int], foreign: bool = False
) -> list[str]:
    """Copy versions, and the blocks of cold ones (source's seq -> target's), bit for bit, in one transaction.

    foreign: somebody else wrote the source; its blocks are looked at as if they were written here.
    """
    embedders = [
        (bank.spec.embedder, features_of(bank.spec.embedder, bank.catalogue.meta("features")))
        for bank in (source, target)
    ]
    same_vectors = embedders[0] == embedders[1]
    filled: list[int] = []

    def rows() -> Iterator[Row]:
        for seq in [*seqs, *fills]:
            name, row, tokens, ref = source.catalogue.read(
                "SELECT (SELECT name FROM shards s WHERE s.shard = e.shard), row, tokens, id || '@' || version "
                "FROM entries e WHERE seq = ?",
                seq,
            )[0]
            if name is not None:
                filled.append(seq)
                try:
                    if foreign:
                        _check_foreign(source, ref, name, row, tokens)
                    yield source.shards.raw(name, row)
                except FileNotFoundError as error:
                    raise BankError(f'"{ref}": {error} is missing; restore it from a backup', ref) from None

    shards = list(target.shards.write(rows()))
    refs, tenants = [], set()
    with target.catalogue.write() as db:
        places = dict(zip(filled, register(db, shards), strict=True))
        for seq, here in fills.items():
            db.execute(
                "UPDATE entries SET shard = ?, row = ?, tokens = ? WHERE seq = ?",
                (*places[seq], source.catalogue.read("SELECT tokens FROM entries WHERE seq = ?", seq)[0][0], here),
            )
        for seq in seqs:
            id, version, tenant, state, tokens, _, _, *rest = source.catalogue.read(
                f"SELECT {COLUMNS} FROM entries WHERE seq = ?", seq
            )[0]
            vector = _vector(source, seq) if same_vectors else pack(target.embedder.embed([rest[4]]))[0]
            db.execute("INSERT OR IGNORE INTO meta VALUES ('dim', ?)", (len(vector) // 2,))
            if state == CURRENT:
                db.execute(f"UPDATE entries SET state = {SUPERSEDED} WHERE id = ? AND state = {CURRENT}", (id,))
            new = db.execute(
                f"INSERT INTO entries ({COLUMNS}) VALUES ({','.join('?' * 13)})",
                (id, version, tenant, state, tokens, *places.get(seq, (None, None)), *rest),
            ).lastrowid
            db.execute("INSERT INTO vectors VALUES (?, ?)", (new, vector))
            db.execute(
                "INSERT INTO ids VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "last_version = excluded.last_version, current = coalesce(excluded.current, current)",
                (id, tenant, version, new if state == CURRENT else None),
            )
            refs.append(f"{id}@{version}")
            tenants.add(tenant)
    target.vectors.keep_up(tenants)
    return refs


def _check_foreign(source: OpenedBank, ref: str, name: str, row: int, tokens: int) -> None:
    block = source.shards.read(name, row, source.spec.torch_dtype)
    check_block(source, f'entry "{ref}"', block, entry=ref)
    if block.tokens != tokens:
        raise BankError(f'entry "{ref}": its block has {block.tokens} tokens, its catalogue says {tokens}', ref)


def _vector(source: OpenedBank, seq: int) -> bytes:
    rows = source.catalogue.read(f"SELECT {VECTOR} FROM vectors v WHERE v.seq = ?", seq)
    check_vectors(source.catalogue.path, rows, source.catalogue.meta("dim"))
    if not rows or not np.isfinite(unpack([rows[0][1]])).all():
        raise BankError(f"{source.catalogue.path}: row {seq} has no vector; reindex that bank, and export it again")
    return rows[0][1]


def _pack(folder: Path, file: Path) -> None:
    with tarfile.open(file, "w") as tar:
        for path in (folder, *sorted(folder.rglob("*"))):
            name = path.relative_to(folder).as_posix()
            if MEMBER.fullmatch(name):
                tar.add(path, name, recursive=False)


def _unpack(file: Path, folder: Path) -> None:
    """Only what a bank is made of, and only plain files, leave the tar. Raises BankError for anything else."""
    try:
        with tarfile.open(file) as tar:
            for member in tar.getmembers():
                plain = member.isfile() and not BARE.fullmatch(member.name)
                if not MEMBER.fullmatch(member.name) or not (plain or member.isdir()):
                    raise BankError(f"{file}: {member.name} is no part of a bank; import what `export` wrote")
                target = folder / member.name
                if member.isdir():
                    target.mkdir(exist_ok=True)
                    continue
                target.parent.mkdir(exist_ok=True)
                with tar.extractfile(member) as packed, open(target, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
    except OSError as error:
        raise not_written(folder, error) from None
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{file}: {error}; import a bank or a tar that `export` wrote") from None
