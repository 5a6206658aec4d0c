"""Defines what a bank refuses, and why."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class BankError(ValueError):
    """A bank cannot do what was asked. entry: the id or reference that it is about, if there is one."""

    def __init__(self, message: str, entry: str | None = None) -> None:
        super().__init__(message)
        self.entry = entry


class UnknownEntryError(BankError):
    """No such entry, or a version that was deleted or compacted away."""

    def __init__(self, entry: str) -> None:
        super().__init__(f'entry "{entry}" is unknown, or not yours; `mem-triton bank list` shows what there is', entry)


class ForeignTenantError(UnknownEntryError):
    """The entry belongs to another tenant. Its message is that of an unknown entry, so that ids cannot be probed."""


class BankModelError(BankError):
    """The bank was made with another model. differences: one "field: bank has X, model has Y" each."""

    def __init__(self, path: Any, differences: Sequence[str]) -> None:
        super().__init__(
            f"{path} was made with another model ({'; '.join(differences)}); "
            "serve that model, or write the bank again with this one"
        )
        self.differences = list(differences)


class BankLockedError(BankError):
    """Another process writes this bank."""


class BankFullError(BankError):
    """There is no room on the disk; nothing was changed."""


class FingerprintError(BankError):
    """A folder that holds no model whose fingerprint can be taken."""


class ArtifactError(BankError):
    """Trained keys and values that cannot be imported or exported; names the file and the field."""


class EmbedderError(BankError):
    """An embedder that is unknown, not installed, cannot be reached or answers nonsense."""


COMPACT = "Delete entries and run `mem-triton bank compact`, which work on a full disk, or make room otherwise"
"""How an open bank gets room."""


def not_written(path: Path, error: Exception, room: str = "Make room on that disk, or choose another") -> BankError:
    """What to raise when a file could not be written; of a library's error, too, that hides the disk's.

    room: how there will be room on a full disk.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or any(f"(os error {code})" in str(error) for code in full):
        return BankFullError(f"{path}: {os.strerror(errno.ENOSPC)}; nothing was changed. {room}")
    return BankError(f"{path}: {error}; nothing was changed")
