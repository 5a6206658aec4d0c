"""Disks that are full, or may not be written: what is there can be read and given up, and nothing is left locked."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mem_triton.store import files
from mem_triton.store.bank import Bank, BankError, NewEntry, shards
from mem_triton.store.block import MemoryBlock
from mem_triton.store.errors import BankFullError
from tests.store.bank_case import LAYERS, block, entry, equal, spec

ROOT = Path(__file__).parents[2]


def mounted(path: Path, *options: str) -> bool:
    """Whether this process may mount, and did."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(path)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 12 MB."""
    if not mounted(tmp_path / "disk", "-o", "size=12m"):
        pytest.skip("may not mount a file system")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def fill_up(disk: Path) -> Path:
    """Leave not one byte."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return disk / "filler"


def large(id: str, seed: int) -> NewEntry:
    """An entry of about 400 KB."""
    shape = (len(LAYERS), 2, 1000)
    g = torch.Generator().manual_seed(seed)
    positions = torch.arange(1000, dtype=torch.int32).expand(shape).contiguous()
    return NewEntry(id, f"text {id}", MemoryBlock(*(torch.randn(*shape, 16, generator=g) for _ in "kv"), positions))


def test_fault17_room_is_freed_on_a_full_disk(small_disk):
    path = small_disk / "bank"
    with Bank.create(path, spec(kind="prefix", keep_tokens=None)) as bank:
        for i in range(3):
            bank.add([large(f"a{i}", i), large(f"b{i}", 10 + i)])
        bank.add([large("c", 20)])
    filler = fill_up(small_disk)
    for _ in range(2):  # an error leaves nothing behind that the next one trips over
        with Bank.open(path, writable=True) as bank:
            with pytest.raises(BankFullError, match="nothing was changed"):
                bank.add([large("d", 30)])
            assert bank.verify() == [] and not bank.knows("d")
    with Bank.open(path) as reader:  # reading needs no room
        assert equal(reader.load("a0@1"), large("a0", 0).block) and len(reader.list()) == 7
    with Bank.open(path, writable=True) as bank:
        for id in ("c", "b0", "b1", "b2"):
            bank.delete(id)
        report = bank.compact()
        assert report["versions"] == 4 and report["shards"] == 4
        assert bank.verify() == [] and bank.stats()["orphans"] == 0 and bank.stats()["shard_bytes"] < 2_400_000
        assert all(equal(bank.load(f"a{i}@1"), large(f"a{i}", i).block) for i in range(3))
        bank.add([large("d", 30)])  # there is room again
    assert filler.exists() and (path / "reserve").stat().st_size == files.Reserve.SIZE


def test_fault17_a_lock_that_cannot_be_signed_is_held_and_let_go(small_disk):
    path = small_disk / "bank"
    Bank.create(path, spec()).close()
    filler = fill_up(small_disk)
    handles = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Bank.open(path, writable=True).close()
    with Bank.open(path, writable=True), pytest.raises(BankError, match="is being written by another process"):
        Bank.open(path, writable=True)
    filler.unlink()
    with Bank.open(path, writable=True) as bank:
        bank.add([entry("a", 1)])
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.parametrize("place", ["catalogue", "repair", "spec", "pwrite"])
def test_fault17_every_failure_to_open_lets_go_of_the_lock(tmp_path, monkeypatch, place):
    path = tmp_path / "bank"
    Bank.create(path, spec()).close()
    handles = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")

        def fail(*_: object, **__: object) -> None:
            raise error

        target = {
            "catalogue": "mem_triton.store.bank.catalogue.connect",
            "repair": "mem_triton.store.bank.vectors.VectorIndex.repair",
            "spec": "mem_triton.store.bank.opened.check_unchanged",
            "pwrite": "os.pwrite",
        }[place]
        patch.setattr(target, fail)
        if place == "pwrite":
            Bank.open(path, writable=True).close()  # the signature is a courtesy
        else:
            with pytest.raises(OSError, match="No space left"):
                Bank.open(path, writable=True)
    assert len(os.listdir("/proc/self/fd")) == handles
    Bank.open(path, writable=True).close()


def test_fault17_a_library_s_error_of_a_full_disk_is_the_bank_s(tmp_path, monkeypatch):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("a", 1), entry("b", 2)])

        def full(*_: object, **__: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(shards, "save_file", full)
            for write in (
                lambda: bank.add([entry("c", 3)]),
                lambda: bank.update("a", entry("a", 3)),
                lambda: bank.export(tmp_path / "export"),
            ):
                with pytest.raises(
                    BankFullError, match=r"\.safetensors: No space left on device; nothing.*bank compact"
                ):
                    write()
            assert not (tmp_path / "export").exists() and bank.stats()["orphans"] == 0
        assert [info.ref for info in bank.list()] == ["a@1", "b@1"] and bank.verify() == []
        bank.add([entry("c", 3)])


READ = """
import sys
from mem_triton.store.bank import Bank, BankError
bank = Bank.open(sys.argv[1])
print(bank.list()[0].ref, bank.search("the locker of a", 1)[0].ref, tuple(bank.load("a@1").keys.shape), bank.verify())
try:
    Bank.open(sys.argv[1], writable=True)
except BankError as error:
    print("refused", error)
"""


@pytest.fixture
def reader_user(tmp_path_factory) -> Iterator[list[str]]:
    """A command line that runs Python as a user who may write nothing of ours."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("cannot become another user")
    yield ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may look into; pytest's own are for one user."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mem_triton-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def run(command: list[str], program: str, *arguments: str) -> str:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HOME": "/tmp",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([*command, program, *arguments], capture_output=True, text=True, cwd="/tmp", env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


EXPECTED = "a@1 a@1 (3, 2, 8, 16) []\nrefused "


def test_fault17_a_bank_of_another_user_is_read(open_folder, reader_user):
    path = open_folder / "bank"
    with Bank.create(path, spec()) as bank:
        bank.add([entry("a", 1)])
        assert run(reader_user, READ, str(path)).startswith(EXPECTED)  # while its owner writes it
    out = run(reader_user, READ, str(path))  # while nobody has it open
    assert out.startswith(EXPECTED) and "cannot be written: Permission denied" in out
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["bank.json", "catalogue.sqlite", "index", "reserve", "shards", "writer.lock"]
    ), "a reader leaves nothing"


def test_fault17_a_bank_on_a_read_only_mount_is_read(tmp_path):
    if not mounted(tmp_path / "disk", "-o", "size=12m"):
        pytest.skip("may not mount a file system")
    try:
        clean, torn = tmp_path / "disk" / "clean", tmp_path / "disk" / "torn"
        with Bank.create(clean, spec()) as bank:
            bank.add([entry("a", 1)])
            shutil.copytree(clean, torn)  # as if its writer had died: its commits lie in SQLite's log
        (torn / "catalogue.sqlite-shm").unlink()
        assert (torn / "catalogue.sqlite-wal").stat().st_size > 0
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for path in (clean, torn):
            out = run([sys.executable, "-c"], READ, str(path))
            assert out.startswith(EXPECTED) and "Read-only file system" in out
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_fault17_a_reader_without_locks_sees_each_commit(tmp_path, monkeypatch):
    """It reads the catalogue as it lies there, and looks again when somebody has written it."""
    from mem_triton.store.bank import connection

    path = tmp_path / "bank"
    with Bank.create(path, spec()) as bank:
        bank.add([entry("a", 1)])
    opened = connection._opened

    def may_not_write(file: Path, mode: str, writable: bool = False) -> object:
        if not writable and "immutable" not in mode and file.parent == path:
            error = connection.sqlite3.OperationalError("attempt to write a readonly database")
            error.sqlite_errorcode = connection.sqlite3.SQLITE_READONLY
            raise error
        return opened(file, mode, writable)

    monkeypatch.setattr(connection, "_opened", may_not_write)
    with Bank.open(path) as reader:
        assert reader.catalogue._connection is None or reader.catalogue._connection.stamp is not None
        assert [info.ref for info in reader.list()] == ["a@1"]
        with Bank.open(path, writable=True) as bank:
            bank.add([entry("b", 2)])
            assert [info.ref for info in reader.list()] == ["a@1", "b@1"], "from a copy of the log"
            bank.add([entry("c", 3)])
            assert [info.ref for info in reader.list()] == ["a@1", "b@1", "c@1"]
        assert [info.ref for info in reader.list()] == ["a@1", "b@1", "c@1"]


# Where a bank may be made.


@pytest.mark.parametrize("lost", ["bank.json", "bank.json and lock"])
def test_fault11_a_bank_without_its_bank_json_keeps_its_entries(tmp_path, lost):
    path = tmp_path / "bank"
    with Bank.create(path, spec()) as bank:
        bank.add([entry("a", 1)])
    json = (path / "bank.json").read_text()
    (path / "bank.json").unlink()
    if "lock" in lost:
        (path / "writer.lock").unlink()
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(BankError, match=r"is a bank whose bank\.json is missing; restore it"):
        Bank.create(path, spec())
    with pytest.raises(BankError, match=r"is a bank whose bank\.json is missing; restore it"):
        Bank.open(path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    (path / "bank.json").write_text(json)
    assert equal(Bank.open(path).load("a@1"), block(1))


def test_fault11_a_bank_of_cold_entries_without_its_bank_json_keeps_them(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([NewEntry("a", "text")])
    (tmp_path / "bank" / "bank.json").unlink()
    with pytest.raises(BankError, match=r"neither empty nor a bank \(it holds catalogue.sqlite\)"):
        Bank.create(tmp_path / "bank", spec())
    assert (tmp_path / "bank" / "catalogue.sqlite").stat().st_size > 0


@pytest.mark.parametrize(
    "name",
    ["catalogue.sqlite", "catalogue.sqlite-wal", "notes.txt", "shards/mine", "index/mine", ".hidden", "writer.lock"],
)
def test_fault11_a_folder_of_somebody_else_is_left_as_it_is(tmp_path, name):
    path = tmp_path / "folder"
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text("mine")
    with pytest.raises(BankError, match=r"neither empty nor a bank .*; choose a folder of the bank's own"):
        Bank.create(path, spec())
    assert [p for p in path.rglob("*") if p.is_file()] == [path / name] and (path / name).read_text() == "mine"


def test_fault11_a_file_or_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "bank"):
        with pytest.raises(BankError) as error:
            Bank.create(path, spec())
        assert "\n" not in str(error.value) and (tmp_path / "file").read_text() == "mine"


def test_fault11_an_empty_folder_and_a_creation_that_died_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    Bank.create(tmp_path / "empty", spec()).close()
    path = tmp_path / "died"
    Bank.create(path, spec()).close()
    (path / "bank.json").unlink()
    with Bank.create(path, spec()) as bank:
        bank.add([entry("a", 1)])
    assert Bank.open(path).verify() == []


def test_fault11_of_two_who_create_at_once_none_loses_the_others_entries(tmp_path, monkeypatch):
    """The second looked before the first was done, and has the lock after it."""
    from mem_triton.store.bank import opened as module

    path, lock = tmp_path / "bank", module.WriterLock

    def late(*arguments: object) -> object:
        monkeypatch.setattr(module, "WriterLock", lock)
        with Bank.create(path, spec()) as first:
            first.add([entry("a", 1)])
        return lock(*arguments)

    monkeypatch.setattr(module, "WriterLock", late)
    with pytest.raises(BankError, match="is a bank already"):
        Bank.create(path, spec())
    assert equal(Bank.open(path).load("a@1"), block(1))
    Bank.open(path, writable=True).close()
