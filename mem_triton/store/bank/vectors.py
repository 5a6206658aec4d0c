"""Nearest entries by cosine: a usearch graph of each tenant's older entries, exact over the newer ones.

Every tenant has a graph of its own, so that a search ranks nothing that it may not see. Graphs are files, written once
and mapped by readers, and only propose candidates. The catalogue says which of them exist, and its vectors say how near
they are, so a graph that is old, wrong or gone costs time and never truth.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch  # noqa: F401, before usearch: loaded after it, faiss crashes when it trains a codec
from usearch.index import Index

from mem_triton.store.bank.catalogue import Catalogue, unpack
from mem_triton.store.bank.spec import Hit
from mem_triton.store.errors import BankError
from mem_triton.store.files import write_durably

logger = logging.getLogger(__name__)

NAME = re.compile(r"[0-9a-f]{32}\.usearch")
SMALLEST_GRAPH, LARGEST_TAIL = 8192, 32768
"""Fewer entries than the first have no graph; more than the second never wait to join one."""
WIDEST = 4096
"""Most candidates looked at one by one before a search with a rare filter looks at all that the filter allows."""
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 64, 192
ADDING_THREADS = 1
"""More lose entries: nodes that are added at once do not see each other, and some end up with no way that leads to them
(usearch 2.26: 3 in 1,000 of 16 threads). Looking for those takes longer than a few threads save."""
ENTRIES_AN_EXPANSION = 640
"""A search looks at EXPANSION_SEARCH nodes of a graph, or at one for so many entries if that is more: of a million, 192
nodes find 83 % of the five nearest, 1,536 find 96 % (hashed words, ``benchmarks/store/bank.py``)."""


File = tuple[str, str, int, int]
"""A graph as the catalogue has it: name, digest, newest entry that is in it, how many are."""


def graph_digest(path: Path, tenant: str, through: int, count: int) -> str:
    """Hash of a whole graph file and of what the catalogue says of it."""
    digest = hashlib.sha256(f"{tenant}|{through}|{count}|".encode())
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


@dataclass
class _Scope:
    """Holds the vectors of one tenant in this process. tail: float32 [n, dim] of the entries behind the graph."""

    revision: int | None = None
    file: str | None = None
    graph: Index | None = None
    through: int = 0  # newest entry that is in graph or tail
    seqs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tail: np.ndarray | None = None


class VectorIndex:
    """Over the vectors of one bank's catalogue. folder: where its graphs lie."""

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder, self._catalogue = folder, catalogue
        self._scopes: dict[str, _Scope] = {}
        self._growing: dict[str, Index] = {}  # a writer's graphs, in memory
        self._lock = threading.Lock()
        self.seconds = 0.0  # that a writer spent on its graphs
        self._missed: set[str] = set()

    def search(
        self, query: np.ndarray, top_k: int, tenants: tuple[str, ...], source: str | None, only_filled: bool
    ) -> list[Hit]:
        """The ``top_k`` nearest current entries of ``tenants`` that the filters allow, best first."""
        revision = self._catalogue.meta("revision")
        scopes = [self._scope(tenant, revision) for tenant in tenants]
        wanted = 4 * top_k + 16
        while True:
            seqs, complete = self._candidates(query, wanted, scopes)
            rows = self._catalogue.accepted(seqs, tenants, source, only_filled)
            if len(rows) >= top_k or complete:
                return _best(query, rows, top_k)
            if wanted > WIDEST:  # what is wanted is rare among the nearest: look at all that the filters allow
                found: list[Hit] = []
                for part in self._catalogue.matching(tenants, source, only_filled):
                    found = sorted(found + _best(query, part, top_k), key=_order)[:top_k]
                return found
            wanted *= 4

    def _candidates(self, query: np.ndarray, wanted: int, scopes: list[_Scope]) -> tuple[list[int], bool]:
        """(entries that may be among the nearest, whether these are all there are)."""
        seqs, complete = [], True
        for scope in scopes:
            if scope.graph is not None and len(scope.graph):
                matches = scope.graph.search(query, min(wanted, len(scope.graph)), threads=1)
                seqs += [int(key) for key in matches.keys]
                complete &= len(matches) >= len(scope.graph)
            if scope.tail is not None and len(scope.tail):
                if len(scope.tail) <= wanted:
                    seqs += scope.seqs.tolist()
                else:
                    nearest = np.argpartition(scope.tail @ query, -wanted)[-wanted:]
                    seqs += scope.seqs[nearest].tolist()
                    complete = False
        return seqs, complete

    def _scope(self, tenant: str, revision: int) -> _Scope:
        """What there is of a tenant as of ``revision`` or later."""
        with self._lock:
            scope = self._scopes.get(tenant) or _Scope()
            if scope.revision is not None and scope.revision >= revision:
                return scope
            file = self._registered(tenant)
            if file is not None and file[0] != scope.file:
                graph = self._view(tenant, file)
                if graph is None and (now := self._registered(tenant)) not in (None, file):
                    file, graph = now, self._view(tenant, now)  # a writer put another in its place meanwhile
                if graph is None and file[0] not in self._missed:
                    self._missed.add(file[0])
                    logger.warning(
                        "%s is missing or damaged: searches are exact and slow until a writer opens the bank",
                        self.folder / file[0],
                    )
                scope = _Scope(file=file[0], graph=graph, through=file[2] if graph is not None else 0)
            parts = list(self._catalogue.vectors(tenant, scope.through))
            seqs = np.concatenate([scope.seqs, *(part[0] for part in parts)])
            tails = [*([scope.tail] if scope.tail is not None else []), *(part[1] for part in parts)]
            # A new object: searches that are under way keep theirs.
            scope = _Scope(
                revision,
                scope.file,
                scope.graph,
                int(seqs[-1]) if parts else scope.through,
                seqs,
                np.concatenate(tails) if tails else None,
            )
            self._scopes[tenant] = scope
            return scope

    def _registered(self, tenant: str) -> File | None:
        rows = self._catalogue.read("SELECT name, digest, through, count FROM index_files WHERE tenant = ?", tenant)
        return rows[0] if rows else None

    def _usable(self, tenant: str, file: File) -> bool:
        """Whether a graph may be given to usearch, which a damaged one would end the process in."""
        name, digest, through, count = file
        path = self.folder / str(name)
        try:
            return bool(NAME.fullmatch(str(name))) and graph_digest(path, tenant, through, count) == digest
        except OSError:
            return False

    def _view(self, tenant: str, file: File) -> Index | None:
        """A registered graph, mapped; None if its file is gone or is another."""
        if not self._usable(tenant, file):
            return None
        graph = self._restored(file, view=True)
        if graph is not None:
            graph.expansion_search = max(EXPANSION_SEARCH, len(graph) // ENTRIES_AN_EXPANSION)
        return graph

    def _restored(self, file: File, view: bool) -> Index | None:
        try:
            return Index.restore(self.folder / file[0], view=view)
        except (RuntimeError, ValueError, OSError) as error:
            logger.warning("%s cannot be read by this usearch: %s", self.folder / file[0], error)
            return None

    def problems(self) -> Iterator[str]:
        """Graphs that are gone, damaged, or of another size than the catalogue says."""
        for tenant, name, count in self._catalogue.read("SELECT tenant, name, count FROM index_files"):
            if (graph := self._view(tenant, self._registered(tenant))) is None:
                yield f"{self.folder / name} is missing or damaged; open the bank for writing to rebuild it"
            elif len(graph) != count:
                yield f"{self.folder / name} has another number of entries than the catalogue says"

    # For the writer.

    def repair(self) -> None:
        """Rebuild graphs whose files are gone or damaged, and bring those up to date that are far behind."""
        for (tenant,) in self._catalogue.read("SELECT tenant FROM index_files"):
            try:
                if not self._usable(tenant, self._registered(tenant)):
                    logger.warning("the index of tenant %r is missing or damaged: it is rebuilt", tenant)
                    self.rebuild(tenant)
                self.grow(tenant)
            except (OSError, RuntimeError, BankError) as error:  # a full disk, say: the bank can be opened all the same
                logger.error("the index of tenant %r could not be rebuilt, searches are slower: %s", tenant, error)

    def keep_up(self, tenants: Iterable[str]) -> None:
        """``grow`` after a commit, which stands whether this works or not."""
        for tenant in tenants:
            try:
                self.grow(tenant)
            except (OSError, RuntimeError, BankError) as error:
                logger.error("the index of tenant %r could not be extended, searches are slower: %s", tenant, error)

    def grow(self, tenant: str) -> None:
        """Take a tenant's newer entries into its graph when there are many of them."""
        file = self._registered(tenant)
        through = file[2] if file else 0
        (waiting,) = self._catalogue.read(
            "SELECT count(*) FROM entries WHERE state = 0 AND tenant = ? AND seq > ?", tenant, through
        )[0]
        indexed = self._catalogue.read("SELECT count FROM index_files WHERE tenant = ?", tenant)
        if waiting >= min(max(SMALLEST_GRAPH, (indexed[0][0] if indexed else 0) // 8), LARGEST_TAIL):
            start = time.monotonic()
            self._extend(tenant, file)
            self.seconds += time.monotonic() - start

    def rebuild(self, tenant: str) -> None:
        """Make a tenant's graph anew from the catalogue, if it still has so many entries."""
        self._growing.pop(tenant, None)
        with self._catalogue.write(revise=False) as db:
            db.execute("DELETE FROM index_files WHERE tenant = ?", (tenant,))
        self.grow(tenant)

    def prune(self) -> None:
        """Rebuild graphs in which a fifth of the entries is not current any more."""
        for tenant, through, count in self._catalogue.read("SELECT tenant, through, count FROM index_files"):
            (current,) = self._catalogue.read(
                "SELECT count(*) FROM entries WHERE state = 0 AND tenant = ? AND seq <= ?", tenant, through
            )[0]
            if count - current > count // 5:
                self.rebuild(tenant)

    def _extend(self, tenant: str, file: File | None) -> None:
        graph = self._growing.pop(tenant, None) if file is not None else None  # kept again once it is on the disk
        if graph is None and file is not None and self._usable(tenant, file):
            graph = self._restored(file, view=False)
        through = 0 if graph is None else file[2]  # without one that can be extended, all anew
        if graph is not None:
            graph.expansion_add = EXPANSION_ADD
        for seqs, vectors in self._catalogue.vectors(tenant, through):
            if graph is None:
                graph = Index(
                    ndim=vectors.shape[1],
                    metric="cos",
                    dtype="i8",
                    connectivity=CONNECTIVITY,
                    expansion_add=EXPANSION_ADD,
                    expansion_search=EXPANSION_SEARCH,
                )
            graph.add(seqs, vectors, threads=ADDING_THREADS)
            through = int(seqs[-1])
        path = self.folder / f"{uuid.uuid4().hex}.usearch"
        write_durably(path, lambda temporary: graph.save(str(temporary)))
        with self._catalogue.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO index_files VALUES (?, ?, ?, ?, ?)",
                (tenant, path.name, graph_digest(path, tenant, through, len(graph)), through, len(graph)),
            )
        self._growing[tenant] = graph
        if file is not None and NAME.fullmatch(str(file[0])):
            (self.folder / file[0]).unlink(missing_ok=True)  # readers that have it mapped keep it


def _order(hit: Hit) -> tuple[float, str]:
    return -hit.score, hit.ref


def _best(query: np.ndarray, rows: list[tuple[str, bytes]], top_k: int) -> list[Hit]:
    """The nearest of (reference, vector) rows by their exact cosine; equals by reference."""
    if not rows:
        return []
    scores = unpack(row[1] for row in rows) @ query
    hits = [Hit(row[0], float(score)) for row, score in zip(rows, scores, strict=True)]
    return sorted(hits, key=_order)[:top_k]
