"""Banks that somebody else made or changed: nothing outside a bank is read, written or removed for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tarfile
import time
from pathlib import Path

import pytest

from mem_triton.store.bank import Bank, BankError, maintenance
from tests.store.bank_case import block, entry, equal, spec


def changed(bank: Path, sql: str, *values: object) -> None:
    """Change a catalogue by hand, without its digests, as a bank of an earlier version, or its owner, may."""
    db = sqlite3.connect(bank / "catalogue.sqlite")
    db.execute(sql, values)
    db.execute("DELETE FROM digests")
    db.execute("DELETE FROM meta WHERE key LIKE 'digest:%' OR key = 'unsigned'")
    db.commit()
    db.close()


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two banks: one has a secret, the other is to get at it."""
    for name, id in (("private", "secret"), ("hostile", "bait")):
        with Bank.create(tmp_path / name, spec()) as bank:
            bank.add([entry(id, 1 if id == "secret" else 2)])
    return tmp_path / "private", tmp_path / "hostile"


@pytest.mark.parametrize("way", ["path", "absolute", "link", "linked folder"])
def test_fault20_a_catalogue_reaches_nothing_outside_its_bank(tmp_path, pair, way):
    private, hostile = pair
    (secret,) = (private / "shards").iterdir()
    if way in ("path", "absolute"):
        name = f"../../private/shards/{secret.name}" if way == "path" else str(secret)
        changed(hostile, "UPDATE shards SET name = ?", name)
    else:
        changed(hostile, "UPDATE shards SET name = ?", secret.name)
        if way == "link":
            (hostile / "shards" / secret.name).symlink_to(secret)
        else:
            shutil.rmtree(hostile / "shards")
            (hostile / "shards").symlink_to(private / "shards")
    if way != "linked folder":  # whoever administers a bank may put its shards on another disk
        with Bank.open(hostile) as bank:
            with pytest.raises(BankError, match=r'"bait@1": .*(which no bank does|is a link)'):
                bank.load("bait@1")
            assert any("which no bank does" in p or "is a link" in p for p in bank.verify())
    with Bank.create(tmp_path / "target", spec()) as target:
        with pytest.raises(BankError, match=r"which no bank does|is a link"):
            target.import_from(hostile)
        assert target.list() == [] and target.stats()["orphans"] == 0
    assert secret.exists()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "../../etc/passwd\n"),
        ("id", "x" * 200),
        ("id", b"bait"),
        ("id", ""),
        ("version", 0),
        ("version", "one"),
        ("tenant", "a\nb"),
        ("tenant", "x" * 200),
        ("metadata", "[]"),
        ("metadata", "{"),
        ("metadata", "[" * 100000),
        ("text", b"\xff"),
        ("tokens", -1),
        ("tokens", 99),
        ("content_hash", b""),
        ("row", 7),
        ("row", -1),
    ],
)
def test_fault20_what_a_catalogue_says_is_checked_where_it_is_read(tmp_path, pair, column, value):
    hostile = pair[1]
    changed(hostile, f"UPDATE entries SET {column} = ?", value)
    with Bank.create(tmp_path / "target", spec()) as target:
        with pytest.raises(BankError) as error:
            target.import_from(hostile)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
        assert target.list() == []
    if column not in ("tokens", "row"):
        with Bank.open(hostile) as bank, pytest.raises(BankError):
            bank.list()


def test_fault20_compact_removes_nothing_behind_a_link(tmp_path):
    victim = tmp_path / "victim"
    (victim / "photos").mkdir(parents=True)
    for name in (
        "precious.txt",
        "photos/a.jpg",
        "old.usearch",
        "old.safetensors",
        ".writing-mine",
        "lease.0.safetensors",
    ):
        (victim / name).write_text("mine")
        os.utime(victim / name, (1, 1))
    before = sorted(victim.rglob("*"))
    for name in ("shards", "index", "incoming"):
        path = tmp_path / f"bank-{name}"
        with Bank.create(path, spec()) as bank:
            if name != "shards":
                bank.add([entry("a", 1)])
            shutil.rmtree(path / name, ignore_errors=True)
            (path / name).symlink_to(victim)
            for link in (path / ".importing-link", path / ".writing-link"):
                link.symlink_to(victim)
            assert any(f"{name} is a link" in problem for problem in bank.verify())
            assert bank.compact()["files"] == 2, "the two links themselves"
            assert bank.stats()["orphans"] == 0
    assert sorted(victim.rglob("*")) == before


def test_fault20_compact_removes_only_what_a_bank_names_so(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("a", 1)])
        kept = [bank.path / "shards" / "README.txt", bank.path / "index" / "notes", bank.path / "mine.safetensors"]
        [path.write_text("mine") for path in kept]
        (bank.path / "shards" / "folder.safetensors").mkdir()
        (bank.path / "shards" / "link.safetensors").symlink_to(tmp_path)
        (bank.path / "shards" / f"{'0' * 32}.safetensors").write_text("orphan")
        assert bank.compact()["files"] == 2
        assert all(path.read_text() == "mine" for path in kept) and (bank.path / "shards/folder.safetensors").is_dir()
        assert not (bank.path / "shards" / "link.safetensors").is_symlink() and tmp_path.is_dir()


def test_fault20_archives_with_folders_for_files_or_cut_short_are_refused(tmp_path, pair):
    private, _ = pair
    with Bank.open(private) as bank:
        bank.export(tmp_path / "good.tar")
    data = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.tar.gz").write_bytes(__import__("gzip").compress(data)[:2000])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "file.tar", "w") as tar:
        tar.add(tmp_path / "file", "shards")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        (tmp_path / "link").symlink_to("/etc/passwd")
        tar.add(tmp_path / "link", "bank.json")
    with Bank.create(tmp_path / "target", spec()) as target:
        for name in ("cut.tar", "cut.tar.gz", "empty.tar", "file.tar", "link.tar"):
            with pytest.raises(BankError):
                target.import_from(tmp_path / name)
        assert target.stats()["orphans"] == 0
        assert target.import_from(tmp_path / "good.tar") == ["secret@1"] and equal(target.load("secret"), block(1))


# What captures leave.


def test_fault18_captures_that_nobody_took_are_seen_and_removed(tmp_path, monkeypatch):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("a", 1)])
        incoming = bank.path / "incoming"
        incoming.mkdir()
        (incoming / "lease.0.safetensors").write_bytes(b"a prompt")
        (problem,) = bank.verify()
        assert "lease.0.safetensors is a capture that no server took (8 bytes" in problem
        assert bank.stats()["orphans"] == 1
        assert bank.compact()["files"] == 1 and bank.verify() == [] and list(incoming.iterdir()) == []


def test_fault18_what_a_running_server_writes_is_left_alone(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        incoming = bank.path / "incoming"
        incoming.mkdir()
        young, old = incoming / "young.0.safetensors", incoming / "old.0.safetensors"
        [path.write_bytes(b"a prompt") for path in (young, old)]
        long_ago = time.time() - maintenance.INCOMING_AGE - 60
        os.utime(old, (long_ago, long_ago))
        handle = os.open(incoming, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)  # as a server does for as long as it lives
            (problem,) = bank.verify()
            assert "old.0.safetensors" in problem
            assert bank.compact()["files"] == 1 and young.exists() and not old.exists()
        finally:
            os.close(handle)
        assert bank.compact()["files"] == 1 and not young.exists()
