"""A store of pools: a folder of versions for each, snapshots and what changed, that survives a kill at any moment.

A version is there once its file has its name, which is after its bytes are on the disk; only then is it acknowledged.
Files are never changed, so a fork shares them by hard links. One process writes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from mem_triton import ids
from mem_triton.store.errors import not_written
from mem_triton.store.files import WriterLock, is_occupied, sync_folder, write_durably
from mem_triton.systems.memoryllm import records
from mem_triton.systems.memoryllm.long_term import LongTerm, PoolState, long_term_after
from mem_triton.systems.memoryllm.records import PoolError, UnknownPoolError, damaged
from mem_triton.systems.memoryllm.shape import PoolInfo, PoolShape, PoolVersion
from mem_triton.systems.memoryllm.update import UpdateStep, updated
from mem_triton.systems.memoryllm.writing import PoolWrite

WEIGHTS = "weights.safetensors"
MAX_POOLS = 64
KEPT = 2
"""Newest versions of so many pools stay in this process."""


class Pools:
    """Reads and writes pools. Made by ``create`` and ``open``; thread-safe; a context manager.

    Example::

        with Pools.open("DST/memory", writable=True) as pools, pools.writing("main") as write:
            write.apply(delta, tokens=512)
            write.commit()                                # "main@2", and it is on the disk
        pools.rows("main@1")                              # [L, N, d], as they were
    """

    def __init__(self, path: Path, shape: PoolShape, about: Mapping[str, Any], max_pools: int = MAX_POOLS) -> None:
        self.path, self.shape, self.about, self.max_pools, self.kept = path, shape, about, max_pools, KEPT
        self._newest: OrderedDict[str, PoolState] = OrderedDict()
        self._writing, self._caching = threading.RLock(), threading.Lock()
        self._lock: WriterLock | None = None

    @classmethod
    def create(cls, path: str | Path, shape: PoolShape, about: Mapping[str, Any]) -> Self:
        """A new store without pools, open for writing. about: of the model, kept beside the shape.

        Raises PoolError if there is something already.
        """
        path = Path(path)
        if is_occupied(path):
            raise PoolError(f"{path} is there already; choose another folder")
        try:
            (path / "pools").mkdir(parents=True)
            records.write_store(path, shape, about)
        except OSError as error:
            raise not_written(path, error) from None
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, writable: bool = False, wait: float = 0.0, max_pools: int = MAX_POOLS) -> Self:
        """Open a store. wait: seconds to wait for another writer. max_pools: that it may have before it takes no more.

        Raises PoolError for what is no store, BankLockedError naming the process that writes it.
        """
        path = Path(path)
        shape, about = records.read_store(path)
        store = cls(path, shape, about, max_pools)
        if writable:
            store.start_writing(wait)
        return store

    def start_writing(self, wait: float = 0.0) -> None:
        """Become the one process that writes; harmless if it is. Raises BankLockedError naming another one."""
        with self._writing:
            if self._lock is None:
                self._lock = WriterLock(self.path / "writer.lock", wait)
                records.tidy(self.path / "pools")

    def close(self) -> None:
        """Let the next writer in; ``start_writing`` takes its turn again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Reading.

    def list(self, tenant: str | None = None) -> list[PoolInfo]:
        """Pools by name. tenant: None for all, else its own and everybody's."""
        infos, _ = self.look()
        return [info for info in infos if tenant is None or info.tenant in ("", tenant)]

    def look(self) -> tuple[list[PoolInfo], list[str]]:
        """The pools, and a problem for what lies among them and is none, or whose own file is damaged."""
        infos, problems = [], []
        for entry in sorted((self.path / "pools").iterdir()):
            if entry.name.startswith("."):
                continue
            try:
                if not (entry / records.POOL).is_file():
                    raise PoolError(f"{entry}: has no {records.POOL}, so it is no pool; move it elsewhere")
                infos.append(self._info(entry))
            except (PoolError, OSError) as error:
                problems.append(str(error))
        return infos, problems

    def info(self, name: str, tenant: str = "") -> PoolInfo:
        """One pool. Raises PoolError for one that is not there or not the tenant's, in the same words."""
        return self._info(self._folder(name, tenant))

    def resolve(self, reference: str, tenant: str = "") -> tuple[str, int]:
        """(name, version) of "main" or "main@2". Raises PoolError for what is not there."""
        name, version = records.split(reference)
        folder = self._folder(name, tenant)
        newest = self._newest_version(folder)
        if version is None:
            if not newest:
                raise PoolError(f'pool "{name}" has no rows yet; write a text into it first')
            return name, newest
        first = self._first_version(folder)
        if not first <= version <= newest:
            raise PoolError(f'"{reference}" is gone or not there yet; "{name}" has versions {first} to {newest}')
        return name, version

    def exact(self, reference: str, tenant: str = "", own: bool = False) -> PoolVersion:
        """What "main" or "main@2" means now; version 0 for a pool without rows. Raises PoolError as ``resolve``.

        own: a pool that the tenant may write.
        """
        name, version = records.split(reference)
        folder = self._folder(name, tenant, own)
        if version is not None or self._newest_version(folder):
            name, version = self.resolve(reference, tenant)
        name, owner, identity = records.read_about(folder)
        return PoolVersion(owner, name, identity, version or 0)

    def state_of(self, version: PoolVersion) -> PoolState:
        """Exactly this version in memory. Raises PoolError if its pool is gone, whatever is called so now."""
        self._exactly(version)
        return self.state(version.id, version.tenant)

    def _exactly(self, version: PoolVersion) -> Path:
        folder = self._folder(version.name, version.tenant, own=True)
        if records.read_about(folder)[2] != version.identity:
            raise PoolError(f'pool "{version.name}" is gone; another one is called so now')
        return folder

    def changes(self, version: PoolVersion, since: int) -> list[UpdateStep]:
        """What makes this version of its pool's version ``since``, step by step. Raises PoolError as ``state_of``."""
        folder = self._exactly(version)
        deltas = [records.read_delta(folder, number) for number in range(since + 1, version.version + 1)]
        if any(two.before != one.link for one, two in pairwise(deltas)):
            raise damaged(folder, "its versions do not follow one another")
        return [step for delta in deltas for step in delta.steps]

    def rows(self, reference: str, tenant: str = "") -> Tensor:
        """The rows [L, N, d] of a version. Raises PoolError for what is not there, or damaged."""
        return self.state(reference, tenant).rows

    def state(self, reference: str, tenant: str = "") -> PoolState:
        """A version in memory. Raises PoolError for what is not there, or damaged."""
        name, version = self.resolve(reference, tenant)
        return self._state(self._folder(name, tenant), version)

    def verify(self) -> list[str]:
        """Problems of every pool, each naming its file; empty if all is well."""
        infos, problems = self.look()
        for info in infos:
            folder = self.path / "pools" / records.directory(info.name, info.tenant)
            try:
                for version in info.snapshots or (0,):
                    self._replay(
                        folder, version, info.version if version == max(info.snapshots, default=0) else version
                    )
            except PoolError as error:
                problems.append(str(error))
        return problems

    # Writing.

    def add(self, name: str, rows: Tensor | None = None, tenant: str = "", long_term: LongTerm | None = None) -> str:
        """A new pool; its reference. rows: [L, N, d] of its version 1, None for one that has no rows yet.

        long_term: of M+, which goes with its rows. Raises PoolError if the name is taken or there are too many.
        """
        if (self.shape.long_term is None) != (long_term is None):
            raise PoolError(f'pool "{name[:200]}": of M+ a pool has long-term rows, and no other has; fork one of M+')
        with self._as_writer():
            made = self._make(name, tenant, lambda folder: self._begin(folder, rows, long_term))
        return made if rows is None else f"{made}@1"

    def fork(self, new: str, reference: str, tenant: str = "") -> str:
        """A new pool that begins as a version of another one; its reference. Both share their files from then on."""
        with self._as_writer():
            name, version = self.resolve(reference, tenant)
            source = self._folder(name, tenant)
            start = max((v for v in records.versions(source)["snapshot"] if v <= version), default=0)
            chosen = [records.file_name(start, "snapshot")] if start else []
            chosen += [records.file_name(v, "delta") for v in range(start + 1, version + 1)]

            def share(folder: Path) -> None:
                for file in chosen:
                    try:
                        os.link(source / file, folder / file)
                    except OSError:  # another disk, or one without links
                        shutil.copyfile(source / file, folder / file)

            return f"{self._make(new, tenant, share)}@{version}"

    @contextmanager
    def writing(self, name: str, seed: int | None = None, tenant: str = "") -> Iterator[PoolWrite]:
        """A write into a pool's newest version, one at a time. seed: of the draws; None: the pool's own generator."""
        with self._as_writer():
            yield self.begin(name, seed, tenant)

    def begin(self, name: str, seed: int | None = None, tenant: str = "") -> PoolWrite:
        """The same for who sees to it himself that a pool has one write at a time; different pools may be written at
        once. Its ``commit`` raises PoolError if another write came in between."""
        with self._as_writer():
            folder = self._folder(name, tenant, own=True)
            newest = self._state(folder, self._newest_version(folder))

        @contextmanager
        def committing() -> Iterator[None]:
            with self._as_writer():
                if self._newest_version(folder) != newest.version:
                    raise PoolError(f'pool "{name}" was written meanwhile; write into its newest version')
                yield

        return PoolWrite(
            self.shape, folder, newest, seed, committing, partial(self._remember, records.read_about(folder)[2])
        )

    def snapshot(self, name: str, tenant: str = "") -> str:
        """Store all rows of the newest version, so that later ones are found sooner; its reference."""
        with self._as_writer():
            folder = self._folder(name, tenant)
            version = self._newest_version(folder)
            if version == 0:
                raise PoolError(f'pool "{name}" has no rows yet; there is nothing to store')
            if version not in records.versions(folder)["snapshot"]:
                state = self._state(folder, version)
                records.write_snapshot(folder, version, state.rows, state.generator, state.link, state.long_term)
            return f"{name}@{version}"

    def compact(self, name: str, tenant: str = "") -> int:
        """Keep the newest version alone; how many files went. The snapshot is on the disk before the first one goes."""
        with self._as_writer():
            reference = self.snapshot(name, tenant)
            folder, newest = self._folder(name, tenant), records.split(reference)[1]
            old = [
                folder / records.file_name(version, kind)
                for kind, found in records.versions(folder).items()
                for version in sorted(found)
                if version < newest or kind == "delta"
            ]
            for path in old:
                path.unlink()
            sync_folder(folder)
            return len(old)

    def delete(self, name: str, tenant: str = "") -> None:
        """Take a pool out. One that is called the same later has another identity."""
        with self._as_writer():
            folder = self._folder(name, tenant, own=True)
            gone = folder.rename(folder.with_name(f".deleted-{uuid.uuid4().hex}"))
            sync_folder(folder.parent)
            shutil.rmtree(gone, ignore_errors=True)

    def _remember(self, identity: str, state: PoolState) -> None:
        with self._caching:
            self._newest[identity] = state
            self._newest.move_to_end(identity)
            while len(self._newest) > self.kept:
                self._newest.popitem(last=False)

    @contextmanager
    def _as_writer(self) -> Iterator[None]:
        if self._lock is None or self._lock.pid != os.getpid():
            raise PoolError(f"{self.path} is open for reading; open it with writable=True")
        with self._writing:
            yield

    def _make(self, name: str, tenant: str, fill: Callable[[Path], object]) -> str:
        if not ids.is_name(name) or (tenant and not ids.is_name(tenant)):
            raise PoolError(f"pool {name[:200]!r}: a name must be {ids.NAME_RULE}")
        folder = self.path / "pools" / records.directory(name, tenant)
        if folder.exists():
            raise PoolError(f'pool "{name}" is taken; choose another name')
        if len(self.list()) >= self.max_pools:
            raise PoolError(f"{self.path} has {self.max_pools} pools already; delete one first")
        making = folder.with_name(f".making-{uuid.uuid4().hex}")
        try:
            making.mkdir()
            about = {"name": name, "tenant": tenant, "identity": uuid.uuid4().hex}
            text = json.dumps(about | {"digest": records.digest_of({}, *about.values())}) + "\n"
            write_durably(making / records.POOL, lambda temporary: temporary.write_text(text))
            fill(making)
            sync_folder(making)
            making.rename(folder)
            sync_folder(folder.parent)
        except BaseException as error:
            shutil.rmtree(making, ignore_errors=True)
            if isinstance(error, OSError):
                raise not_written(folder, error) from None
            raise
        return name

    def _begin(self, folder: Path, rows: Tensor | None, long: LongTerm | None) -> None:
        if rows is None:
            return
        shape = self.shape
        if tuple(rows.shape) != (shape.layers, shape.rows, shape.hidden):
            raise PoolError(f"memory: {list(rows.shape)}, expected {[shape.layers, shape.rows, shape.hidden]}")
        if not bool(rows.isfinite().all()):
            raise PoolError("memory: holds NaN or infinity; take another checkpoint")
        records.write_snapshot(folder, 1, rows.to(shape.torch_dtype), records.fresh_generator(folder), None, long)

    def _folder(self, name: str, tenant: str, own: bool = False) -> Path:
        """own: not everybody's, which a tenant may read and not write."""
        whose = ([tenant] if own else [tenant, ""]) if ids.is_name(name) and (not tenant or ids.is_name(tenant)) else []
        for owner in whose:
            folder = self.path / "pools" / records.directory(name, owner)
            if (folder / records.POOL).is_file():
                return folder
        raise UnknownPoolError(
            f'pool "{str(name)[:200]}" is unknown, or not yours; `mem-triton pool list` shows what there is'
        )

    def _info(self, folder: Path) -> PoolInfo:
        name, tenant, identity = records.read_about(folder)
        size = sum(entry.stat().st_size for entry in folder.iterdir())
        snapshots = tuple(sorted(records.versions(folder)["snapshot"]))
        return PoolInfo(name, tenant, identity, self._newest_version(folder), snapshots, size)

    def _newest_version(self, folder: Path) -> int:
        return max(set().union(*records.versions(folder).values()), default=0)

    def _first_version(self, folder: Path) -> int:
        return min(records.versions(folder)["snapshot"] or {1})

    def _state(self, folder: Path, version: int) -> PoolState:
        here = self._newest.get(identity := records.read_about(folder)[2])  # another process may have made it again
        if here is not None and here.version == version:
            return here
        start = max((v for v in records.versions(folder)["snapshot"] if v <= version), default=0)
        state = self._replay(folder, start, version, here if here and start <= here.version < version else None)
        if self._newest_version(folder) == version:
            self._remember(identity, state)
        return state

    def _replay(self, folder: Path, start: int, version: int, after: PoolState | None = None) -> PoolState:
        """A version from the snapshot at ``start`` (0: from nothing), or a later one, and what further ones changed."""
        shape, state = self.shape, after
        if state is None and start == 0:
            state = PoolState(0, None, records.fresh_generator(folder), "")
        elif state is None:
            found = records.read_snapshot(folder, start)
            state = PoolState(start, found.rows, found.state, found.link, found.long)
            fits = tuple(found.rows.shape) == (shape.layers, shape.rows, shape.hidden)
            if not fits or (found.long is None) != (shape.long_term is None):
                raise damaged(folder / records.file_name(start, "snapshot"), f"has rows {list(found.rows.shape)}")
        rows, long = state.rows, state.long_term
        for number in range(state.version + 1, version + 1):
            delta = records.read_delta(folder, number)
            if delta.before != state.link:
                raise damaged(folder / records.file_name(number, "delta"), "does not follow the version before it")
            for step in delta.steps:
                rows, long = updated(rows, step, shape.rows), long_term_after(rows, long, step, shape)
            state = PoolState(number, rows, delta.state, delta.link, long)
        return state
