"""Which LoRA adapter answers a request: states and cached keys and values that were computed under it belong to it.

An engine reads an adapter's files once and serves what it read. So an adapter is known by what its files held then,
whatever they hold since.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import uuid
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILES = ("adapter_config.json", "*.safetensors", "*.bin", "*.pt")
"""What engines read of an adapter's folder."""
Files = tuple[tuple[str, int, int, int, int], ...]
"""Name, inode, size, and the times of writing and of change of the folder and each file: equal where nothing was
written and nothing was put in another's place."""


def always() -> bool:
    """Whether an adapter stays that cannot change."""
    return True


@dataclass(frozen=True)
class Adapter:
    """The adapter that answers a request. identity: its name and a digest of the files that were loaded.

    load: tells one engine's loads of other weights apart, in the keys of its caches. holds: whether nothing else can
    have been loaded in its place since the request was admitted.
    """

    identity: str
    load: str = ""
    holds: Callable[[], bool] = always


@dataclass(eq=False)
class _Load:
    """number: of the load. since: number of the first load in a row without any other weights in between."""

    digest: str
    files: Files
    number: int
    since: int
    droppable: bool = False

    def is_unsure(self, path: str | None) -> bool:
        """Whether the engine may have dropped it and read other files since, without a word."""
        return self.droppable and path is not None and files_of(path) != self.files


class LoadedAdapters:
    """The adapters that an engine has loaded, each under the engine's own key of it.

    capacity: how many the engine keeps before it drops one, which it loads again without a word when it is named again;
    None for an engine that tells of every load.

    Example::

        with adapters.loading(key, path) as loaded:
            ...                                # the engine reads the files
            loaded()
        adapter = adapters.answering(key, name, path)
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._loads: dict[Hashable, _Load] = {}
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def loading(self, key: Hashable, path: str | None) -> Iterator[Callable[[], None]]:
        """Watch a load, and give what records it when it has succeeded; one that raises may have happened.

        path: of the files, None for weights that come from none.
        """
        before = None if path is None else files_of(path)
        try:
            yield lambda: self.loaded(key, path, before)
        except BaseException:
            self.unsure(key)
            raise

    def loaded(self, key: Hashable, path: str | None, before: Files | None) -> None:
        """Record what the engine has loaded. before: the files when it began, None for weights that came from no files.

        Without files, or where they changed while they were read, the adapter is like no other.
        """
        try:
            digest, files = files_digest(path), files_of(path)
        except OSError:  # gone meanwhile
            digest, files = "", ()
        known = before is not None and files and before in ((), files)  # (): the engine has downloaded it
        load = _Load(digest if known else _unlike_any(), files, number := next(self._numbers), number)
        last = self._loads.get(key)
        if last is not None and last.digest == load.digest and not last.is_unsure(path):
            load.since = last.since
        self._loads[key] = load
        if self.capacity is not None and len(self._loads) > self.capacity:
            for load in self._loads.values():  # which of them it has dropped, the engine alone knows
                load.droppable = True

    def unsure(self, key: Hashable) -> None:
        """Record a load that did not come to its end: the engine may have other weights under this key, or have not."""
        if key in self._loads:
            self.loaded(key, None, None)

    def answering(self, key: Hashable, name: str, path: str | None) -> Adapter:
        """Return the adapter that answers under this key. path: where the engine reads it if it has dropped it.

        One that was not told, or that may have been dropped and loaded again from files that have changed, is like no
        other: nobody can say which of them it is.
        """
        load = self._loads.get(key)
        if load is None or load.is_unsure(path):
            return Adapter(f"{name}:{_unlike_any()}", holds=lambda: False)
        return Adapter(
            f"{name}:{load.digest}",
            f"#{load.since}",
            lambda: self._has_stayed(key, load.number, path),
        )

    def _has_stayed(self, key: Hashable, number: int, path: str | None) -> bool:
        now = self._loads.get(key)
        return now is not None and now.since <= number and not now.is_unsure(path)

    def has_read(self, key: Hashable, path: str | None) -> bool:
        """Return whether what was loaded under this key are the files of this path as they are now."""
        return key in self._loads and self._loads[key].files == files_of(path)

    def knows(self, key: Hashable) -> bool:
        """Whether it has been loaded."""
        return key in self._loads

    def forget(self, key: Hashable) -> None:
        """Forget an adapter that the engine was told to unload."""
        self._loads.pop(key, None)


def files_of(path: str | None) -> Files:
    """Return what tells an adapter's files from others, without reading them. Empty where they are not here."""
    if (folder := _folder(path)) is None:
        return ()
    try:
        stats = [("", folder.lstat()), *((place.name, place.stat()) for place in (folder, *_read_of(folder)))]
    except OSError:  # somebody is putting others there
        return ()
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def files_digest(path: str | None) -> str:
    """8 hex digits of what an adapter's files hold now. Raises OSError."""
    folder, digest = _folder(path), hashlib.sha256()
    for file in _read_of(folder) if folder is not None else ():
        with open(file, "rb") as data:
            digest.update(f"{file.name} {hashlib.file_digest(data, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:8]


def _folder(path: str | None) -> Path | None:
    """The folder that an engine reads. path: a folder, or a name on Hugging Face's hub that was downloaded."""
    if not path:
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except (OSError, ValueError):  # no name, or not here
            return None
    return folder


def _read_of(folder: Path) -> list[Path]:
    return sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})


def _unlike_any() -> str:
    return f"changed-{uuid.uuid4().hex[:12]}"
