"""Which LoRA adapter answers a request: states and cached keys and values that were computed under it belong to it.

An engine reads an adapter's files once and serves what it read. So an adapter is known by what its files held then,
whatever they hold since.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

from mem_triton.store.bank.fingerprint import sampled_digest

FILES = "adapter_*"
"""peft's ``adapter_config.json`` and ``adapter_model.safetensors``."""


class LoadedAdapters:
    """The adapters that an engine has loaded, each under the engine's own key of it.

    capacity: how many the engine keeps before it drops one, which it loads again without a word when it is named again;
    None for an engine that tells of every load.

    Example::

        before = files_digest(path)
        ...                                    # the engine reads the files
        adapters.loaded(key, path, before)
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._digests: dict[Hashable, str] = {}

    def loaded(self, key: Hashable, path: str | None, before: str | None) -> None:
        """The engine has loaded it. before: the digest when it began, None for weights that came from no files.

        Without files, or where they changed while they were read, the adapter is like no other.
        """
        self._digests[key] = before if before is not None and before == files_digest(path) else _unlike_any()

    def identity(self, key: Hashable, name: str, path: str | None) -> str:
        """Return an adapter's name with a digest of the files that were loaded.

        An adapter whose load was not told is loaded by its first request. One that may have been dropped and loaded
        again, and whose files have changed, is like no other: nobody can say which of them it is.
        """
        digest = self._digests.setdefault(key, files_digest(path))
        dropped = path is not None and self.capacity is not None and len(self._digests) > self.capacity
        if dropped and digest != files_digest(path):
            digest = _unlike_any()
        return f"{name}:{digest}"

    def knows(self, key: Hashable) -> bool:
        """Whether it has been loaded."""
        return key in self._digests

    def forget(self, key: Hashable) -> None:
        """Forget an adapter that the engine was told to unload."""
        self._digests.pop(key, None)


def files_digest(path: str | None) -> str:
    """8 hex digits of an adapter's files as they are now. path: a folder; of anything else it is that of the path
    itself. Takes about a millisecond when a file has changed."""
    return _digest(path or "", _state(path))[:8]


def _unlike_any() -> str:
    return f"changed-{uuid.uuid4().hex[:12]}"


def _state(path: str | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of the adapter's files."""
    if not path or not Path(path).is_dir():
        return ()
    stats = [(file.name, file.stat()) for file in sorted(Path(path).glob(FILES)) if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=256)
def _digest(path: str, state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in state:
        digest.update(f"{name} {sampled_digest(Path(path, name))}\n".encode())
    return digest.hexdigest() if state else hashlib.sha256(path.encode()).hexdigest()
