"""How entries get into a bank: checked first, then their shards onto the disk, then one transaction that names them."""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from mem_triton import ids
from mem_triton.store.bank.captured import EVERYBODY, SOURCE, is_captured
from mem_triton.store.bank.catalogue import CURRENT, DELETED, SUPERSEDED, pack
from mem_triton.store.bank.opened import OpenedBank
from mem_triton.store.bank.shards import Row, Shard
from mem_triton.store.bank.spec import NewEntry, check_id, split_ref
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import BankError, ForeignTenantError, UnknownEntryError

COLUMNS = "id, version, tenant, state, tokens, shard, row, created, content_hash, source, metadata, text, token_ids"


def writer(function: Callable) -> Callable:
    """For functions of a bank that only its writer may call, one thread at a time."""

    def checked(bank: OpenedBank, *args: Any, **options: Any) -> Any:
        if not bank.writable:
            raise BankError(f"{bank.path} is open for reading; open it with writable=True")
        with bank.writing:
            return function(bank, *args, **options)

    checked.__doc__, checked.__name__ = function.__doc__, function.__name__
    return checked


@writer
def add(bank: OpenedBank, entries: Sequence[NewEntry], update: bool) -> list[str]:
    """``Bank.add``, and ``Bank.update`` for entries that must exist."""
    if not entries:
        return []
    metadata = [check_entry(bank, entry) for entry in entries]
    versions = [next_version(bank, entry, update) for entry in entries]
    id, count = Counter(entry.id for entry in entries).most_common(1)[0]
    if count > 1:
        raise BankError(f'id "{id}" is {count} times in one batch; add it once', id)
    embedder = bank.embedder
    vectors = pack(embedder.embed([entry.text for entry in entries]))
    blocks = [i for i, entry in enumerate(entries) if entry.block is not None]
    shards = list(bank.shards.write(encoded(bank, entries[i].id, entries[i].block) for i in blocks))
    now = time.time()
    with bank.catalogue.write() as db:
        db.execute("INSERT OR IGNORE INTO meta VALUES ('dim', ?)", (embedder.dim,))
        places = dict(zip(blocks, register(db, shards), strict=True))
        first = (db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone() or (0,))[0] + 1
        if update:
            db.executemany(
                f"UPDATE entries SET state = {SUPERSEDED} WHERE seq = (SELECT current FROM ids WHERE id = ?)",
                [(entry.id,) for entry in entries],
            )
        db.executemany(
            f"INSERT INTO entries (seq, {COLUMNS}) VALUES ({','.join('?' * 14)})",
            (
                (
                    first + i,
                    e.id,
                    versions[i],
                    e.tenant,
                    CURRENT,
                    e.block.tokens if e.block is not None else 0,
                    *places.get(i, (None, None)),
                    now,
                    bytes.fromhex(e.content_hash),
                    e.source,
                    metadata[i],
                    e.text,
                    pack_ids(e.token_ids),
                )
                for i, e in enumerate(entries)
            ),
        )
        db.executemany("INSERT INTO vectors VALUES (?, ?)", ((first + i, v) for i, v in enumerate(vectors)))
        db.executemany(
            "INSERT INTO ids VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "last_version = excluded.last_version, current = excluded.current",
            ((e.id, e.tenant, versions[i], first + i) for i, e in enumerate(entries)),
        )
    bank.vectors.keep_up({entry.tenant for entry in entries})
    return [f"{entry.id}@{version}" for entry, version in zip(entries, versions, strict=True)]


@writer
def fill(bank: OpenedBank, blocks: Mapping[str, MemoryBlock]) -> None:
    """``Bank.fill_all``."""
    seqs = []
    for ref, block in blocks.items():
        found = bank.catalogue.find(ref, "seq, shard")
        if found is None:
            raise UnknownEntryError(ref)
        if found[1] is not None:
            raise BankError(f'"{ref}" has its block already; entries do not change, update it instead', ref)
        check_block(bank, ref, block)
        seqs.append(found[0])
    shards = list(bank.shards.write(encoded(bank, ref, block) for ref, block in blocks.items()))
    with bank.catalogue.write() as db:
        places = register(db, shards)
        db.executemany(
            "UPDATE entries SET tokens = ?, shard = ?, row = ? WHERE seq = ?",
            [(b.tokens, *place, seq) for b, place, seq in zip(blocks.values(), places, seqs, strict=True)],
        )


@writer
def delete(bank: OpenedBank, id_or_ref: str, tenant: str | None) -> None:
    """``Bank.delete``."""
    found = bank.catalogue.find(id_or_ref, "seq, id, tenant", damaged=True)
    if found is None:
        raise UnknownEntryError(id_or_ref)
    seq, id, owner = found
    if tenant is not None and owner != tenant:
        raise ForeignTenantError(id_or_ref)
    with bank.catalogue.write() as db:
        if split_ref(id_or_ref)[1] is None:
            db.execute(f"UPDATE entries SET state = {DELETED} WHERE id = ?", (id,))
            db.execute("UPDATE ids SET current = NULL WHERE id = ?", (id,))
            return
        db.execute(f"UPDATE entries SET state = {DELETED} WHERE seq = ?", (seq,))
        if db.execute("UPDATE ids SET current = NULL WHERE id = ? AND current = ?", (id, seq)).rowcount:
            make_current(db, id)
    bank.vectors.keep_up({owner})


def make_current(db: Any, id: str) -> None:
    """The newest version of an id that is left is what it names again.

    It gets a new ``seq``: indexes and open readers look for what is new behind those that they know.
    """
    newest = "SELECT seq FROM entries WHERE id = ? AND state < 2 ORDER BY version DESC LIMIT 1"
    if (found := db.execute(newest, (id,)).fetchone()) is None:
        return
    db.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'entries'")
    ((seq,),) = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchall()
    db.execute(f"UPDATE entries SET seq = ?, state = {CURRENT} WHERE seq = ?", (seq, *found))
    db.execute("UPDATE vectors SET seq = ? WHERE seq = ?", (seq, *found))
    db.execute("UPDATE ids SET current = ? WHERE id = ?", (seq, id))


@writer
def rename(bank: OpenedBank, old: str, new: str) -> str:
    """Give an entry with all its versions another id; the reference of the newest one.

    Numbers of versions stay given under the old id. Raises UnknownEntryError, and BankError if the new id is taken.
    """
    check_id(new)
    if is_captured(new):
        raise BankError(f'id "{new}": what begins so is kept for captures (mem_capture); choose another', new)
    found = bank.catalogue.find(split_ref(old)[0], "id, version, tenant")
    if found is None or old != found[0]:
        raise UnknownEntryError(old)
    if bank.catalogue.read("SELECT 1 FROM ids WHERE id = ?", new):
        raise BankError(f'id "{new}" is taken; choose another', new)
    with bank.catalogue.write() as db:
        db.execute("INSERT INTO ids SELECT ?, tenant, last_version, current FROM ids WHERE id = ?", (new, old))
        db.execute("UPDATE ids SET current = NULL WHERE id = ?", (old,))
        db.execute("UPDATE entries SET id = ? WHERE id = ?", (new, old))
    return f"{new}@{found[1]}"


@writer
def rename_tenant(bank: OpenedBank, old: str, new: str) -> int:
    """Give all entries of a tenant to another one that has none, under the same ids; how many entries.

    Raises BankError for a name that no request can say, and for one that is in use.
    """
    if not ids.is_name(new):
        raise BankError(f"tenant {new!r}: must be {ids.NAME_RULE}")
    if not old or not bank.catalogue.read("SELECT 1 FROM ids WHERE tenant = ? LIMIT 1", old):
        raise BankError(f"tenant {old!r} has no entries here")
    if bank.catalogue.read("SELECT 1 FROM ids WHERE tenant = ? LIMIT 1", new):
        raise BankError(f"tenant {new!r} is there already; its entries would be mixed with others'")
    with bank.catalogue.write() as db:
        db.execute("UPDATE ids SET tenant = ? WHERE tenant = ?", (new, old))
        count = db.execute("UPDATE entries SET tenant = ? WHERE tenant = ?", (new, old)).rowcount
        db.execute("DELETE FROM index_files WHERE tenant = ?", (old,))
    bank.vectors.keep_up({new})
    return count


@writer
def set_sink(bank: OpenedBank, block: MemoryBlock) -> None:
    """``Bank.set_sink``."""
    check_block(bank, "the sink", block, layers=bank.spec.fingerprint.num_layers)
    here = bank.sink()
    if here is not None and same_block(here, block):
        return
    if bank.catalogue.read("SELECT 1 FROM entries LIMIT 1"):
        raise BankError(f"{bank.path}: its entries were written under another prefix; make a new bank for this one")
    (shard,) = bank.shards.write([bank.shards.encode(block, bank.shards.lossless)])
    with bank.catalogue.write() as db:
        register(db, [shard])
        sink = json.dumps({"name": shard.name, "sha256": shard.sha256})
        db.execute("INSERT OR REPLACE INTO meta VALUES ('sink', ?)", (sink,))


def encoded(bank: OpenedBank, entry: str, block: MemoryBlock) -> Row:
    """A block in the bank's codec. Raises BankError naming the entry."""
    try:
        return bank.shards.encode(block)
    except BankError as error:
        raise BankError(f'entry "{entry}": {error}', entry) from None


def register(db: Any, shards: Iterable[Shard]) -> list[tuple[int, int]]:
    """Name shards in the catalogue; (shard, row) of every row in them."""
    places = []
    for shard in shards:
        cursor = db.execute(
            "INSERT INTO shards (name, bytes, sha256) VALUES (?, ?, ?)", (shard.name, shard.bytes, shard.sha256)
        )
        places += [(cursor.lastrowid, row) for row in range(shard.rows)]
    return places


def next_version(bank: OpenedBank, entry: NewEntry, update: bool) -> int:
    """Raises BankError if there is an entry where there must be none, or the reverse, or if the id is another's."""
    rows = bank.catalogue.read("SELECT tenant, last_version, current FROM ids WHERE id = ?", entry.id)
    if rows and rows[0][0] != entry.tenant:
        if update:
            raise ForeignTenantError(entry.id)
        raise BankError(f'id "{entry.id}" is taken; choose another', entry.id)
    if update and (not rows or rows[0][2] is None):
        raise UnknownEntryError(entry.id)
    if not update and rows and rows[0][2] is not None:
        raise BankError(f'id "{entry.id}" is taken; update it, or choose another', entry.id)
    return rows[0][1] + 1 if rows else 1


def check_entry(bank: OpenedBank, entry: NewEntry) -> str:
    """The entry's metadata as JSON. Raises BankError naming the field that is wrong."""
    check_id(entry.id)
    if is_captured(entry.id) and entry.source != SOURCE:
        raise BankError(f'id "{entry.id}": what begins so is kept for captures (mem_capture); choose another', entry.id)

    def wrong(field: str, what: str) -> BankError:
        return BankError(f'entry "{entry.id}": {field}: {what}', entry.id)

    for name in ("text", "source", "tenant", "content_key"):
        if not isinstance(getattr(entry, name), str):
            raise wrong(name, f"is {type(getattr(entry, name)).__name__}, expected a string")
    if not entry.text.strip():
        raise wrong("text", "is empty; leave the entry out")
    if entry.tenant not in ("", EVERYBODY) and not ids.is_name(entry.tenant):
        raise wrong("tenant", f"must be at most 128 characters ({ids.NAME_RULE}), got {entry.tenant[:200]!r}")
    try:
        entry.text.encode()
        metadata = json.dumps(dict(entry.metadata), allow_nan=False, ensure_ascii=False)
        pack_ids(entry.token_ids)
    except UnicodeEncodeError as error:
        raise wrong("text", f"{error.reason} at character {error.start}; it is no valid Unicode") from None
    except (OverflowError, TypeError, ValueError) as error:
        raise wrong("metadata or token_ids", f"{error}; give what JSON can hold, and tokens as whole numbers") from None
    if entry.block is not None:
        check_block(bank, f'entry "{entry.id}"', entry.block, entry=entry.id)
    return metadata


def check_block(
    bank: OpenedBank, who: str, block: MemoryBlock, layers: int | None = None, entry: str | None = None
) -> None:
    """Raises BankError naming the tensor that does not fit the bank. layers: how many it must have."""
    spec = bank.spec
    layers, sink = layers or len(spec.layers), layers is not None
    shape = (layers, spec.kv_heads, block.keys.shape[2] if block.keys.ndim == 4 else "T", spec.head_dim)

    def wrong(name: str, what: str) -> BankError:
        return BankError(f"{who}: {name} {what}", entry)

    for name in ("keys", "values"):
        tensor = getattr(block, name)
        if tuple(tensor.shape) != shape:
            raise wrong(name, f"are {list(tensor.shape)}, expected {list(shape)} (layers, KV heads, tokens, head dim)")
        if tensor.dtype != spec.torch_dtype:
            raise wrong(name, f"are {tensor.dtype}, the bank has {spec.torch_dtype}; convert them")
        if not torch.isfinite(tensor).all():
            raise wrong(name, "hold NaN or infinity; look at the encoder")
    tokens = block.tokens
    if tokens < 1:
        raise wrong("keys", "have no tokens")
    if tuple(block.positions.shape) != shape[:3] or block.positions.dtype != torch.int32:
        found = f"{list(block.positions.shape)} {block.positions.dtype}"
        raise wrong("positions", f"are {found}, expected {list(shape[:3])} torch.int32")
    positions = block.positions
    if bool((positions < 0).any()) or bool((positions.diff(dim=2) <= 0).any()):
        raise wrong("positions", "must ascend from 0 within each head")
    if sink or spec.kind == "prefix":
        if int(positions.max()) >= tokens:
            raise wrong("positions", f"of a dense block must be 0 to {tokens - 1}")
        return
    if spec.keep_tokens is not None and tokens > spec.keep_tokens:
        raise wrong("keys", f"have {tokens} tokens, the bank keeps {spec.keep_tokens}; select them first")
    if int(positions.max()) >= spec.reference_tokens:
        raise wrong(
            "positions", f"reach {int(positions.max())}, a reference has {spec.reference_tokens} tokens; split it"
        )


def same_block(a: MemoryBlock, b: MemoryBlock) -> bool:
    """Bit for bit."""
    return all(torch.equal(getattr(a, name), getattr(b, name).cpu()) for name in ("keys", "values", "positions"))


def pack_ids(token_ids: Sequence[int] | None) -> bytes | None:
    """Token ids as the catalogue stores them: int32."""
    return None if token_ids is None else array("i", token_ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The reverse of ``pack_ids``."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()
