"""Writes files that are there whole or not at all, reads those of others, and locks a second writer out."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mem_triton.store.errors import BankError, BankFullError, BankLockedError

WRITING = ".writing-"
"""Start of the name of a file that is not finished; after a crash nobody refers to it."""


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
"""Files of a model's weights: which of several holds each tensor, or the one that holds them all."""


def is_occupied(path: Path) -> bool:
    """Whether something is at a path that a new folder is to have; an empty folder is nothing."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def read_object(path: Path, fix: str, refused: type[ValueError]) -> dict[str, Any]:
    """Read a JSON object that another program wrote. Raises ``refused`` naming the file, what is wrong, and ``fix``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(f"{path}: {error}; {fix}") from None
    except (ValueError, RecursionError) as error:
        raise refused(f"{path}: cannot be read as JSON: {error}; {fix}") from None
    if not isinstance(data, dict):
        raise refused(f"{path}: holds {kind_of(data)}, expected an object; {fix}")
    return data


def kind_of(value: Any) -> str:
    """Name the kind of a JSON value for a message."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def indexed_files(folder: Path, fix: str, refused: type[ValueError]) -> dict[str, str] | None:
    """Read which file of a folder of weights holds each tensor; None if it has no index.

    Raises ``refused`` naming the index or the file that is damaged or missing, and ``fix``.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    found = read_object(path, fix, refused).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise refused(f"{path}: weight_map is no object of file names; {fix}")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise refused(f"{path}: weight_map: {str(name)[:60]!r} is no name of a file beside it; {fix}")
    if missing := sorted(name for name in set(found.values()) if not (folder / name).is_file()):
        raise refused(f"{folder}: {missing[0]} is missing; {fix}")
    return found


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file under a temporary name, put it on the disk, and only then give it its own name."""
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link
        write(temporary)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fchmod(handle, path.parent.stat().st_mode & 0o666)  # who may look into the folder may read what is in it
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class WriterLock:
    """Held by the one process that writes a bank; the kernel frees it when that process ends, however it ends.

    wait: seconds to wait for it. Raises BankLockedError naming who has it.
    """

    def __init__(self, path: Path, wait: float = 0.0) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise BankError(f"{path.parent} cannot be written: {error.strerror}: {path}; open it for reading") from None
        try:
            self._take(path, time.monotonic() + wait)
        except BaseException:
            os.close(self._handle)
            raise
        self.pid = os.getpid()
        with suppress(OSError):  # a full disk: nobody can read who has the lock, but it is held
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps({"pid": self.pid, "host": socket.gethostname()}).encode(), 0)

    def _take(self, path: Path, deadline: float) -> None:
        while True:
            try:
                return fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BankLockedError(
                        f"{path.parent} is being written by {_holder(self._handle)}; wait for it, or open the bank for "
                        "reading"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                raise BankError(f"{path}: cannot be locked: {error.strerror}; put the bank on a local disk") from None

    def release(self) -> None:
        """Let the next writer in. In a forked child nothing is released but the child's own handle."""
        try:
            if self.pid == os.getpid():
                with suppress(OSError):
                    os.ftruncate(self._handle, 0)
                fcntl.flock(self._handle, fcntl.LOCK_UN)
        finally:
            os.close(self._handle)


RESERVE = "reserve"
"""A file without content that keeps room for what frees room."""
T = TypeVar("T")


class Reserve:
    """Room on the disk that a bank keeps, so that entries can be deleted and compacted when the disk is full."""

    SIZE, PART = 1 << 20, 1 << 18

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESERVE

    def fill(self) -> None:
        """Take the room again, as far as there is some."""
        with suppress(OSError):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                if os.fstat(handle).st_size < self.SIZE:
                    os.posix_fallocate(handle, 0, self.SIZE)
            finally:
                os.close(handle)

    def spend(self) -> bool:
        """Give a part of it back to the disk; False if there is none."""
        with suppress(OSError):
            size = self.path.lstat().st_size
            if size and not self.path.is_symlink():
                os.truncate(self.path, max(0, size - self.PART))
                return True
        return False

    def run(self, action: Callable[[], T]) -> T:
        """Do what frees room, or opens a bank for it; parts of the reserve are spent while the disk is full."""
        while True:
            try:
                return action()
            except BankFullError:
                if not self.spend():
                    raise


def is_signature(path: Path) -> bool:
    """Whether a file may be a writer's lock: empty, or signed by a writer."""
    if path.is_symlink() or not path.is_file():
        return False
    data = path.read_bytes()[:4096]
    with suppress(ValueError):
        return not data or set(json.loads(data)) == {"pid", "host"}
    return False


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has the lock, but has not signed yet
