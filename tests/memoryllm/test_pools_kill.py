"""A writer of pools is killed at any moment: the pool is the version before or the one after, never between.

Writers are forked from this process, which has torch loaded. What version n holds follows from n alone.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mem_triton.store import files
from mem_triton.systems.memoryllm import records
from mem_triton.systems.memoryllm.pools import Pools, PoolShape
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.update import UpdateStep, draw_dropped, updated

SHAPE = PoolShape(layers=2, rows=64, hidden=32, tokens=8, dtype="float32")
KILLS = 200
MOST = 150
"""Kills until a fault must have shown."""


def delta_of(version: int) -> torch.Tensor:
    return torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(version))


class Expected:
    """The rows of every version, computed beside the store."""

    def __init__(self) -> None:
        self.rows = [None, torch.zeros(2, 64, 32)]

    def at(self, version: int) -> torch.Tensor:
        while len(self.rows) <= version:
            n = len(self.rows)
            dropped = draw_dropped(64, 8, 1, torch.Generator().manual_seed(n))
            self.rows.append(updated(self.rows[-1], UpdateStep(delta_of(n), dropped), 64))
        return self.rows[version]


def write_without_end(path: Path, say: int, fault: str | None) -> None:
    """The forked writer. say: the pipe on which it acknowledges."""
    if fault:
        FAULTS[fault]()
    with Pools.open(path, writable=True, wait=10.0) as pools:
        version = pools.resolve("main")[1]
        os.write(say, b"0\n")
        while True:
            version += 1
            with pools.writing("main", seed=version) as writing:
                writing.apply(delta_of(version))
                if fault == "acknowledges first":
                    os.write(say, f"{version}\n".encode())
                    time.sleep(0.001)
                writing.commit()
            if fault != "acknowledges first":
                os.write(say, f"{version}\n".encode())
            if version % 6 == 0:
                pools.compact("main")
            if version % 4 == 0:
                if any(info.name == "fork" for info in pools.list()):
                    pools.delete("fork")
                pools.fork("fork", "main")


def in_place() -> None:
    """Files get their names before they are whole."""

    def write(path: Path, write: Callable[[Path], None]) -> None:
        files.write_durably(path.with_name("whole"), write)
        data = path.with_name("whole").read_bytes()
        with open(path, "wb") as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                file.flush()
                time.sleep(0.0005)

    records.write_durably = write


def goes_first() -> None:
    """Compacting takes old files away before the new snapshot is there."""
    stock = records.write_snapshot

    def write(folder: Path, *rest: object) -> str:
        for path in folder.glob("*.delta.*"):
            path.unlink()
        time.sleep(0.002)
        return stock(folder, *rest)

    records.write_snapshot = write


FAULTS = {"acknowledges first": lambda: None, "in place": in_place, "goes first": goes_first}


def killed(path: Path, chance: random.Random, fault: str | None) -> int:
    """Run a writer for a moment; the last version that it has acknowledged, 0 if none."""
    read, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            write_without_end(path, say, fault)
        finally:
            os._exit(1)
    os.close(say)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        begun = pipe.read(2) if chance.random() < 0.9 else b""  # else it is killed while it opens the store
        time.sleep(chance.random() * 0.08)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        words = (begun + pipe.read()).decode().split("\n")[:-1]
    return int(words[-1]) if words else 0


def check(path: Path, expected: Expected, acknowledged: int) -> int:
    """The newest version, which is whole and not older than what was acknowledged."""
    with Pools.open(path) as pools:
        assert pools.verify() == []
        version = pools.resolve("main")[1]
        assert acknowledged <= version <= acknowledged + 1
        assert torch.equal(pools.rows("main"), expected.at(version))
        for info in pools.list():
            if info.name == "fork":
                assert torch.equal(pools.rows("fork"), expected.at(info.version))
    return version


@pytest.fixture
def store(tmp_path) -> Path:
    torch.set_num_threads(1)  # threads do not outlive a fork
    with Pools.create(tmp_path / "memory", SHAPE, {}) as pools:
        pools.add("main", torch.zeros(2, 64, 32))
    return tmp_path / "memory"


def test_killed_writers_leave_a_version_and_never_half_of_one(store):
    chance, expected, version = random.Random(1), Expected(), 1
    for _ in range(KILLS):
        version = check(store, expected, max(version, killed(store, chance, None)))
    assert version > KILLS // 4, "they have written something"
    with Pools.open(store, writable=True) as pools:
        names = [entry.name for entry in (store / "pools").iterdir()]
        assert [name for name in names if name.startswith(".")] == [], "what was unfinished is gone"
        assert pools.resolve("main")[1] == version


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writer_with_a_fault_is_seen(store, fault):
    chance, expected, version = random.Random(2), Expected(), 1
    with pytest.raises((AssertionError, PoolError)):
        for _ in range(MOST):
            version = check(store, expected, max(version, killed(store, chance, fault)))


def test_a_version_is_on_the_disk_before_it_is_acknowledged(store, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        stock = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, stock=stock, name=name: (events.append(name), stock(*a))[1])
    with Pools.open(store, writable=True) as pools, pools.writing("main", seed=2) as writing:
        writing.apply(delta_of(2))
        assert events == []
        writing.commit()
        assert events == ["fsync", "replace", "fsync"], "bytes, name, folder"
