"""Damaged files of a bank: what is read is as it was written, or an error names what is damaged."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mem_triton.ops.block_codec import get_codec
from mem_triton.store import checksums
from mem_triton.store.bank import Bank, BankError
from tests.store.bank_case import HEADS, LAYERS, MODEL, block, entry, equal, spec

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
    from mem_triton.store.shards import file_sha256

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
    """Damage one file again and again; how often an error was raised. Fails if a block is not what was written."""
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
        of(), of(row=1), of(layers=range(1, 3)), of(first=1), of(values=x), of(keys=x.view(torch.int32)),
        of(keys=x.reshape(2, 3, 64, 8)), of(keys=moved.view_as(x)), of(keys=x, values=x), of(keys=-x),
    ]  # fmt: skip
    assert len(set(different)) == len(different) and of() == of(keys=x.clone())
    odd = torch.randint(0, 256, (2, 3, 7, 3), dtype=torch.uint8)  # product codes: no whole words
    for place in [(0, 0, 0, 0), (1, 2, 6, 2)]:
        other = odd.clone()
        other[place] ^= 1
        assert of(keys=odd) != of(keys=other)


def test_fault19_a_shard_without_checksums_is_read_and_checked_as_a_whole(tmp_path, written):
    shutil.copytree(written("fp32"), tmp_path / "bank")
    as_written_before(tmp_path / "bank")
    with Bank.open(tmp_path / "bank", writable=True) as bank:
        assert all(equal(bank.load(f"e{i}@1"), block(i)) for i in range(6)) and bank.verify() == []
        bank.delete("e5")
        bank.compact()  # writes the rows that stay anew, with checksums
        assert all(
            s.checksums is not None for s in [bank.shards._file(p.name) for p in bank.shards.folder.iterdir()][:1]
        )
        assert all(equal(bank.load(f"e{i}@1"), block(i)) for i in range(5))
