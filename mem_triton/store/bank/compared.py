"""Decides which reads of a shard's rows are compared with their checksums.

A row is compared when this process reads it for the first time, when its file has changed since, and at every eighth
read: while a file's inode, size and times stay as they were, only what the kernel has read from the disk anew can have
changed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable
from pathlib import Path

EVERY = 8
"""Reads of a row of an unchanged file, of which one is compared."""
SETTLED_NS = 2_000_000_000
"""Age of a file's last change from which its times show the next one: the coarsest clock of a usual file system."""
MAX_PARTS = 4096
"""Parts of rows that are remembered for one shard; beyond it all are forgotten, and compared anew."""


class Compared:
    """What was compared of one shard, and how often it was read since. Thread-safe.

    Example::

        if compared.is_due("row 3"):
            ...                         # compare it, and once it is found right:
            compared.add("row 3")
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = str(path), threading.Lock()
        self._file: tuple[int, ...] | None = None  # as it was when `_reads` was begun
        self._reads: dict[Hashable, int] = {}  # part -> reads since it was compared

    def is_due(self, part: Hashable) -> bool:
        """Return whether a part that is read now is to be compared."""
        file = self._stat()
        with self._lock:
            if file != self._file:
                self._file, self._reads = file, {}
            reads = self._reads.get(part, EVERY) + 1
            if reads < EVERY:
                self._reads[part] = reads
        return reads >= EVERY

    def add(self, part: Hashable) -> None:
        """Note that a part was compared and found right."""
        with self._lock:
            if self._file is None:  # a change would not show; one since ``is_due`` shows at the next
                return
            if len(self._reads) >= MAX_PARTS:
                self._reads.clear()
            self._reads[part] = 0

    def _stat(self) -> tuple[int, ...] | None:
        """What changes with the file; None while a change would not show, or if it is gone."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED_NS:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
