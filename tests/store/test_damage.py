"""Damaged files of a bank: what is read is as it was written, or an error names what is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mem_triton.ops.block_codec import get_codec
from mem_triton.store.bank import Bank, BankError, NewEntry, checksums, compared, vectors
from mem_triton.store.bank.compared import EVERY, Compared
from mem_triton.store.bank.fingerprint import sampled_digest
from mem_triton.store.bank.shards import StoredRow
from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.pool import PagePool
from tests.store.bank_case import DIM, HEADS, LAYERS, MODEL, block, entry, equal, spec

KINDS = ["bit", "bytes", "zeros", "cut", "longer"]


def mutate(data: bytes, seed: int) -> bytes:
    """One accident: a bit, some bytes, a hole of zeros, an end that is missing, or more than there was."""
    r, data = random.Random(seed), bytearray(data)
    kind, at = KINDS[seed % len(KINDS)], r.randrange(len(data))
    if kind == "bit":
        data[at] ^= 1 << r.randrange(8)
    elif kind == "bytes":
        for _ in range(20):
            data[r.randrange(len(data))] = r.randrange(256)
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "cut":
        del data[at:]
    else:
        data += r.randbytes(r.randrange(1, 100))
    return bytes(data)


def without_checksums(shard: Path) -> None:
    """The file as a version without checksums wrote it."""
    data = shard.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]["checksums"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def as_written_before(bank: Path) -> None:
    """Make a bank's shards those of a version without checksums, with the hashes of the files that they then were."""
    from mem_triton.store.bank.shards import file_sha256

    with Bank.open(bank, writable=True) as opened, opened.catalogue.write() as db:
        for path in (bank / "shards").iterdir():
            without_checksums(path)
            sizes = (path.stat().st_size, file_sha256(path), path.name)
            db.execute("UPDATE shards SET bytes = ?, sha256 = ? WHERE name = ?", sizes)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """A bank of six entries and a constant prefix by codec; to be copied, not to be changed."""
    made: dict[str, Path] = {}

    def bank(codec: str) -> Path:
        if codec not in made:
            state = None
            if codec == "pq":
                trained = get_codec("pq")
                trained.train([block(seed, tokens=48) for seed in range(40)], "PQ4x4")
                state = trained.state()
            made[codec] = tmp_path_factory.mktemp("written") / codec
            with Bank.create(made[codec], spec(codec=codec), state) as new:
                new.set_sink(block(9, tokens=4, layers=MODEL.num_layers, dense=True))
                new.add([entry(f"e{i}", i, token_ids=[i, 7], metadata={"n": i}) for i in range(6)])
        return made[codec]

    return bank


def blocks(bank: Bank) -> Iterator[tuple[str, object]]:
    """Every block of a bank, whole and in parts; a BankError where one is damaged."""
    part = {"layers": [LAYERS[-1]], "heads": slice(1, HEADS)}
    reads = {f"e{i}{'' if not options else ' part'}": (f"e{i}@1", options) for i in range(6) for options in ({}, part)}
    for name, (ref, options) in reads.items():
        try:
            yield name, bank.load(ref, **options)
        except BankError as error:
            assert ref in str(error) and "\n" not in str(error)
    with contextlib.suppress(BankError):
        yield "sink", bank.sink()


def survived(before: Path, after: Path, mutations: range, pattern: str) -> int:
    """Damage one file again and again; how often an error was raised. Fails if something else was loaded."""
    with Bank.open(before) as bank:
        right = dict(blocks(bank))
    assert len(right) == 13
    raised = 0
    for seed in mutations:
        files = sorted((before / "shards").glob(pattern))
        file = files[seed % len(files)]
        (after / "shards" / file.name).write_bytes(mutate(file.read_bytes(), seed))
        try:
            with Bank.open(after) as bank:
                found = dict(blocks(bank))
        except BankError:
            found = {}
        wrong = [name for name, got in found.items() if not equal(got, right[name])]
        assert wrong == [], f"mutation {seed} of {file.name}: {wrong} loaded as if they were right"
        raised += len(found) < len(right)
        (after / "shards" / file.name).write_bytes(file.read_bytes())
    return raised


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp8", "pq"])
@pytest.mark.parametrize("checksums", [True, False])
def test_fault19_no_damaged_shard_loads_as_if_it_were_right(tmp_path, written, codec, checksums):
    shutil.copytree(written(codec), tmp_path / "before")
    if not checksums:
        as_written_before(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    assert survived(tmp_path / "before", tmp_path / "after", range(40), "*") > 20


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp8", "pq"])
def test_fault19_no_damaged_shard_loads_as_if_it_were_right_in_a_long_run(tmp_path, written, codec):
    shutil.copytree(written(codec), tmp_path / "after")
    assert survived(written(codec), tmp_path / "after", range(1000, 4000), "*") > 2000


def test_fault19_an_error_names_entry_file_and_fix(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    with Bank.open(tmp_path / "bank") as bank:
        (shard,) = bank.catalogue.read("SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE e.id = 'e2'")[0]
    path = tmp_path / "bank" / "shards" / shard
    data = bytearray(path.read_bytes())
    at = data.index(block(2).keys[1, 1].numpy().tobytes())  # layer 1 in the second head
    data[at : at + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    with Bank.open(tmp_path / "bank") as bank:
        with pytest.raises(BankError, match=rf'"e2@1": .*{shard}: row \d+ has changed since .*restore the file'):
            bank.load("e2@1")
        with pytest.raises(BankError, match="has changed"):
            bank.load("e2@1", layers=[1], heads=slice(1, 2))
        assert torch.equal(bank.load("e2@1", heads=slice(0, 1)).keys, block(2).keys[:, :1]), "that part is as it was"
        assert equal(bank.load("e3@1"), block(3))


def test_fault19_checksums_see_what_moves():
    """A word, two words of a block's places, rows, names, dtypes and shapes."""
    x = torch.randn(2, 3, 8, 64)

    def of(row: int = 0, layers: range = range(2), first: int = 0, **tensors: torch.Tensor) -> bytes:
        return checksums.part_checksums(row, tensors or {"keys": x}, layers, slice(first, first + 3)).tobytes()

    moved = x.reshape(2, 3, -1).clone()
    moved[:, :, :128], moved[:, :, 128:256] = x.reshape(2, 3, -1)[:, :, 128:256], x.reshape(2, 3, -1)[:, :, :128]
    different = [
        of(),
        of(row=1),
        of(layers=range(1, 3)),
        of(first=1),
        of(values=x),
        of(keys=x.view(torch.int32)),
        of(keys=x.reshape(2, 3, 64, 8)),
        of(keys=moved.view_as(x)),
        of(keys=x, values=x),
        of(keys=-x),
    ]
    assert len(set(different)) == len(different) and of() == of(keys=x.clone())
    odd = torch.randint(0, 256, (2, 3, 7, 3), dtype=torch.uint8)  # product codes: no whole words
    for place in [(0, 0, 0, 0), (1, 2, 6, 2)]:
        other = odd.clone()
        other[place] ^= 1
        assert of(keys=odd) != of(keys=other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int32])
def test_fault19_compiled_checksums_are_those_of_torch(monkeypatch, dtype):
    """Small parts are added up by compiled code, large ones by torch: what one has written the other checks."""
    for shape in [(2, 3, 8, 128), (1, 1, 8), (3, 2, 1, 520), (18, 8, 8, 64), (2, 2, 64, 8), (3, 1, 7, 3)]:
        tensors = {name: torch.randint(-9, 9, shape).to(dtype) for name in ("keys", "values")}
        layers, heads = range(4, 4 + shape[0]), slice(1, 1 + shape[1])
        monkeypatch.setattr(checksums, "SMALL", 1 << 30)
        found = [checksums.part_checksums(7, tensors, layers, heads, often) for often in (False, True)]
        assert found[0].shape == shape[:2] and np.array_equal(*found), (dtype, shape)


def test_fault19_a_file_that_changes_while_it_is_open_is_compared_again(tmp_path, written, monkeypatch):
    """An entry that was read before: at the next read if the file's times show it, at the eighth if they do not."""
    monkeypatch.setattr(compared, "SETTLED_NS", 0)  # the copy was made just now
    path, bank = changed_while_open(tmp_path, written)
    with bank, pytest.raises(BankError, match=r'"e2@1": .* has changed'):
        bank.load("e2@1")
    shutil.rmtree(path)
    monkeypatch.setattr(Compared, "_stat", lambda self: (1,))  # the negative control: times that show nothing
    path, bank = changed_while_open(tmp_path, written)
    with bank:
        for _ in range(EVERY - 1):
            bank.load("e2@1")
        with pytest.raises(BankError, match="has changed"):
            bank.load("e2@1")
        assert bank.verify(), "whose reads are all compared"


def changed_while_open(tmp_path: Path, written: Callable[[str], Path]) -> tuple[Path, Bank]:
    """A bank whose shard was written long ago; one bit of e2 has changed since e2 was read."""
    path = tmp_path / "bank"
    shutil.copytree(written("fp32"), path)
    old = time.time() - 100
    with Bank.open(path) as bank:
        (shard,) = bank.catalogue.read("SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE e.id = 'e2'")[0]
    shard = path / "shards" / shard
    os.utime(shard, (old, old))
    bank = Bank.open(path)
    assert equal(bank.load("e2@1"), block(2))
    data = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(at := data.index(block(2).keys[1, 1].numpy().tobytes()))
        file.write(bytes([data[at] ^ 1]))
    os.utime(shard, (old, old))
    return path, bank


def test_fault19_reads_of_a_file_that_has_just_changed_are_all_compared(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(b"1")
    seen = Compared(path)
    assert [seen.is_due(1) or seen.add(1) for _ in range(3)] == [True] * 3
    for _ in range(3):
        seen.add(1)
    assert seen.is_due(1), "its times need not show another change"
    with mock.patch.object(compared, "SETTLED_NS", 0):
        assert seen.is_due(1) and seen.is_due(2)
        seen.add(1)
        assert [seen.is_due(1) for _ in range(EVERY)] == [False] * (EVERY - 1) + [True] and seen.is_due(2)
        path.unlink()
        assert seen.is_due(1), "what is gone shows nothing"


def test_fault19_nothing_of_a_damaged_entry_reaches_a_page(tmp_path, written, monkeypatch):
    """A load places and packs an entry before it is compared; it fails before a page is filled."""
    shutil.copytree(written("fp32"), tmp_path / "bank")
    with Bank.open(tmp_path / "bank") as bank:
        (shard,) = bank.catalogue.read("SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE e.id = 'e2'")[0]
    path = tmp_path / "bank" / "shards" / shard
    data = bytearray(path.read_bytes())
    data[data.index(block(2).values[1, 1].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with Bank.open(tmp_path / "bank") as bank:
        pool = PagePool(len(LAYERS), HEADS, DIM, 16, 4, torch.float32, "cpu")
        loader = PageLoader(pool, bank.reading, host_bytes=1 << 20)
        try:
            tokens = block(2).tokens
            assert "has changed since" in loader.load(PageLoad("e2@1", [1], tokens)).result(20)
            assert not pool.read([1]).data.any() and loader.stats()["used.host"] == 0
            monkeypatch.setattr(StoredRow, "compare", lambda self: None)
            assert loader.load(PageLoad("e2@1", [1], tokens)).result(20) is None and pool.read([1]).data.any()
        finally:
            loader.close()


def test_fault19_a_shard_without_checksums_is_read_and_checked_as_a_whole(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    as_written_before(tmp_path / "bank")
    with Bank.open(tmp_path / "bank", writable=True) as bank:
        assert all(equal(bank.load(f"e{i}@1"), block(i)) for i in range(6)) and bank.verify() == []
        bank.delete("e5")
        bank.compact()  # writes the rows that stay anew, with checksums
        ((shard,),) = bank.catalogue.read("SELECT DISTINCT s.name FROM entries JOIN shards s USING (shard)")
        assert bank.shards._file(shard).checksums is not None
        assert all(equal(bank.load(f"e{i}@1"), block(i)) for i in range(5))


# The catalogue and bank.json.


def answers(path: Path) -> dict[str, object]:
    """What a bank says of its entries, and a word where it says that something is damaged instead."""
    questions: dict[str, Callable[[Bank], object]] = {
        "list": lambda bank: bank.list(),
        "tenant": lambda bank: bank.list(tenant=""),
        "search": lambda bank: bank.search("the locker of e3 is number 3", 3),
        "spec": lambda bank: bank.spec,
        "sink": lambda bank: bank.sink().keys.sum().item(),
        "hash": lambda bank: bank.find_hash(entry("e2", 2, token_ids=[2, 7]).content_hash),
    }
    for i in range(6):
        questions[f"info {i}"] = lambda bank, i=i: bank.resolve(f"e{i}")
        questions[f"ids {i}"] = lambda bank, i=i: bank.token_ids(f"e{i}@1")
        questions[f"block {i}"] = lambda bank, i=i: bank.load(f"e{i}@1").keys.sum().item()
    found: dict[str, object] = {}
    try:
        with Bank.open(path) as bank:
            for name, ask in questions.items():
                with contextlib.suppress(BankError):
                    found[name] = ask(bank)
    except BankError as error:
        assert "\n" not in str(error)
    return found


def damaged_answers(before: Path, after: Path, name: str, seeds: range) -> int:
    """Damage a file again and again; how often something was refused. Fails if an answer is another one."""
    right, whole = answers(before), (before / name).read_bytes()
    assert len(right) == 24
    refused = 0
    for seed in seeds:
        (after / name).write_bytes(mutate(whole, seed))
        found = answers(after)
        wrong = {key: (value, right[key]) for key, value in found.items() if value != right[key]}
        assert wrong == {}, f"mutation {seed}"
        refused += len(found) < len(right)
    return refused


@pytest.mark.parametrize(("name", "least"), [("catalogue.sqlite", 30), ("bank.json", 60)])
def test_fault19_no_damaged_catalogue_answers_as_if_it_were_right(tmp_path, written, name, least):
    shutil.copytree(written("fp32"), tmp_path / "after")
    assert damaged_answers(written("fp32"), tmp_path / "after", name, range(100)) > least


@pytest.mark.slow
@pytest.mark.parametrize("name", ["catalogue.sqlite", "bank.json"])
def test_fault19_no_damaged_catalogue_answers_as_if_it_were_right_in_a_long_run(tmp_path, written, name):
    shutil.copytree(written("pq"), tmp_path / "after")
    damaged_answers(written("pq"), tmp_path / "after", name, range(1000, 6000))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET text = 'The locker of e3 is number 4.' WHERE id = 'e3'",
        "UPDATE entries SET metadata = '{\"n\": 4}' WHERE id = 'e3'",
        "UPDATE entries SET row = 4 WHERE id = 'e3'",
        "UPDATE entries SET token_ids = x'04000000' WHERE id = 'e3'",
        "UPDATE entries SET created = 1.5, version = 1 WHERE id = 'e3'",
        "UPDATE entries SET source = 'other.md' WHERE id = 'e3'",
        "UPDATE shards SET name = '" + 32 * "0" + ".safetensors' WHERE shard = 2",
        "UPDATE vectors SET vector = zeroblob(length(vector)) WHERE seq = 4",
        "UPDATE meta SET value = 'x' WHERE key = 'spec'",
        "UPDATE meta SET value = x'00' WHERE key = 'sink'",
        "UPDATE meta SET key = 'digest:x' WHERE key = 'digest:spec'",
        "UPDATE meta SET key = 'digest:x' WHERE key = 'digest:sink'",
        "DELETE FROM digests WHERE seq = 4",
        "UPDATE digests SET seq = 99 WHERE seq = 4",
    ],
)
def test_fault19_a_changed_row_is_found_where_it_is_read(tmp_path, written, change):
    """With SQLite's own bookkeeping in order: only the rows' digests can say it, and one that is gone is damage, too:
    random changes of a whole file made both at once."""
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    assert db.execute(change).rowcount == 1
    db.commit()
    db.close()
    right, found = answers(written("fp32")), answers(tmp_path / "bank")
    assert len(found) < len(right) and all(found[key] == right[key] for key in found)


def test_fault19_a_damaged_count_of_revisions_hides_nothing(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    db.execute("UPDATE meta SET value = -122 WHERE key = 'revision'")
    db.commit()
    db.close()
    assert answers(tmp_path / "bank") == answers(written("fp32"))


def test_fault19_a_change_by_the_writer_is_signed_and_does_not_bless_what_was_damaged(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    db.execute("UPDATE entries SET text = 'changed' WHERE id = 'e3'")
    db.commit()
    db.close()
    with Bank.open(tmp_path / "bank", writable=True) as bank:
        bank.update("e2", entry("e2", 12))
        bank.update("e3", entry("e3", 13))
        bank.delete("e4")
        bank.compact()
        assert bank.resolve("e2@2").text == entry("e2", 12).text and equal(bank.load("e3@2"), block(13))
    shutil.rmtree(tmp_path / "bank")
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    db.execute("UPDATE entries SET text = 'changed' WHERE id = 'e3'")
    db.commit()
    db.close()
    with Bank.open(tmp_path / "bank", writable=True) as bank:
        bank.update("e3", entry("e3", 13))  # the first version is superseded, and is still another than was written
        with pytest.raises(BankError, match=r'the row of "e3@1" has changed since it was written'):
            bank.resolve("e3@1")
        bank.delete("e3@1")  # what is damaged can be taken away
        assert bank.resolve("e3").version == 2


def test_fault19_a_bank_without_digests_is_read_and_gets_them(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    db.executescript("DROP TABLE digests; DELETE FROM meta WHERE key LIKE 'digest:%' OR key IN ('spec', 'unsigned')")
    db.close()
    assert answers(tmp_path / "bank") == answers(written("fp32"))
    with Bank.open(tmp_path / "bank", writable=True) as bank:
        bank.add([entry("new", 7)])
        bank.catalogue.db.execute("DROP TRIGGER sign_change")
        bank.catalogue.db.execute("UPDATE entries SET text = 'changed' WHERE id IN ('e1', 'new')")
        assert bank.resolve("e1").text == "changed", "it has no digest yet"
        with pytest.raises(BankError, match="has changed since"):
            bank.resolve("new")


def test_fault19_an_entry_that_became_another_tenants_is_not_given_to_it(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    db = sqlite3.connect(tmp_path / "bank" / "catalogue.sqlite")
    db.execute("UPDATE entries SET tenant = 'other' WHERE id = 'e3'")
    db.commit()
    db.close()
    with Bank.open(tmp_path / "bank") as bank:
        for ask in (lambda: bank.resolve("e3", tenant="other"), lambda: bank.list("other"), lambda: bank.load("e3@1")):
            with pytest.raises(BankError, match=r'the row of "e3(@1)?" has changed'):
                ask()


# Graphs.


@pytest.fixture
def with_graph(tmp_path, monkeypatch) -> Bank:
    monkeypatch.setattr(vectors, "SMALLEST_GRAPH", 64)
    with Bank.create(tmp_path / "bank", spec(embedder="lexical:64")) as bank:
        bank.add([NewEntry(f"e{i}", f"The locker {i * 7919} of number {i}") for i in range(300)])
        yield bank


def test_fault12_usearch_never_sees_a_damaged_graph(with_graph, monkeypatch, caplog):
    """It would end the process: 21 of 120 such files did."""
    seen, (path,) = [], (with_graph.path / "index").iterdir()
    whole = path.read_bytes()
    restore = vectors.Index.restore

    def watched(file: Path, view: bool) -> object:
        assert Path(file).read_bytes() == whole, "usearch was given a damaged file"
        seen.append(file)
        return restore(file, view=view)

    monkeypatch.setattr(vectors.Index, "restore", watched)
    right = [hit.ref for hit in with_graph.search("The locker 7919 of number 1", 5)]
    assert len(seen) == 1
    for seed in range(60):
        path.write_bytes(mutate(whole, seed))
        if path.read_bytes() == whole:  # zeros over zeros
            continue
        with Bank.open(with_graph.path) as reader:
            assert [hit.ref for hit in reader.search("The locker 7919 of number 1", 5)] == right
            assert len(reader.verify()) == 1
    assert len(seen) == 1
    for at in range(0, len(whole), len(whole) // 50):  # what samples of a file would miss
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert with_graph.vectors._view("", with_graph.vectors._registered("")) is None
    for column, value in (("through", 1000), ("count", 3), ("tenant", "'x'"), ("digest", "'ab'")):
        path.write_bytes(whole)
        with with_graph.catalogue.write() as db:
            before = db.execute("SELECT * FROM index_files").fetchone()
            db.execute(f"UPDATE index_files SET {column} = {value}")
        assert len(with_graph.verify()) == 1, column
        with with_graph.catalogue.write() as db:
            db.execute("DELETE FROM index_files")
            db.execute("INSERT INTO index_files VALUES (?, ?, ?, ?, ?)", before)
    assert with_graph.verify() == [] and len(seen) > 1


def test_fault12_a_writer_builds_anew_what_was_damaged_while_it_was_open(with_graph):
    """Not only when it opens the bank: when it extends a graph, too."""
    with_graph.close()
    with Bank.open(with_graph.path, writable=True) as bank:
        (path,) = (bank.path / "index").iterdir()
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
        bank.add([NewEntry(f"f{i}", f"The garden {i * 7919} of number {i}") for i in range(100)])
        ((name, count),) = bank.catalogue.read("SELECT name, count FROM index_files")
        assert count == 400 and name != path.name and not path.exists() and bank.verify() == []


def test_fault12_a_graph_of_an_earlier_version_is_built_anew(with_graph, caplog):
    (path,) = (with_graph.path / "index").iterdir()
    with with_graph.catalogue.write() as db:
        db.execute("UPDATE index_files SET digest = ?", (sampled_digest(path),))
    with_graph.close()
    with Bank.open(with_graph.path) as reader:
        assert len(reader.search("The locker 7919 of number 1", 5)) == 5
    with Bank.open(with_graph.path, writable=True) as bank:
        assert bank.verify() == [] and bank.catalogue.read("SELECT name FROM index_files") != [(path.name,)]
    assert sum("it is rebuilt" in record.message for record in caplog.records) == 1
