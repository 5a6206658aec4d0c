"""Files that are there whole or not at all, and the lock of the one writer."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from mem_triton.store.errors import BankLockedError

WRITING = ".writing-"
"""Start of the name of a file that is not finished; after a crash nobody refers to it."""


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
        write(temporary)
        handle = os.open(temporary, os.O_RDONLY)
        try:
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
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                holder = _holder(self._handle)
                os.close(self._handle)
                raise BankLockedError(
                    f"{path.parent} is being written by {holder}; wait for it, or open the bank for reading"
                ) from None
        self.pid = os.getpid()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"pid": self.pid, "host": socket.gethostname()}).encode(), 0)

    def release(self) -> None:
        """Let the next writer in. In a forked child nothing is released but the child's own handle."""
        if self.pid == os.getpid():
            os.ftruncate(self._handle, 0)
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has the lock, but has not signed yet
