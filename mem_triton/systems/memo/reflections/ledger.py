"""Every document, unit of work, call and pair of a build in one SQLite file, so that a build that was killed goes on.

A unit's pairs are written in the transaction that says it is done: what is there after a kill is whole, and at most the
calls that were in flight are made again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (id TEXT PRIMARY KEY, source TEXT NOT NULL, digest TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE units (id INTEGER PRIMARY KEY, step TEXT NOT NULL, key TEXT NOT NULL, docs TEXT NOT NULL,
  input TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'open', reason TEXT NOT NULL DEFAULT '', UNIQUE (step, key));
CREATE TABLE calls (id INTEGER PRIMARY KEY, unit INTEGER NOT NULL, outcome TEXT NOT NULL DEFAULT 'lost',
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL DEFAULT 0);
CREATE TABLE pairs (unit INTEGER NOT NULL, number INTEGER NOT NULL, step TEXT NOT NULL, docs TEXT NOT NULL,
  question TEXT NOT NULL, answer TEXT NOT NULL, written TEXT NOT NULL, held_out INTEGER NOT NULL DEFAULT 0,
  dropped TEXT NOT NULL DEFAULT '', prompt TEXT NOT NULL, generator TEXT NOT NULL, PRIMARY KEY (unit, number));
"""


class BuildError(ValueError):
    """A build that cannot go on; the message names the file or the server, and what can be done."""


@dataclass(frozen=True)
class SourceText:
    """A document: its id, where it is from, and its text."""

    id: str
    source: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Unit:
    """One call's work. docs: the documents that it is about; input: what its prompt is made of."""

    id: int
    step: str
    docs: tuple[str, ...]
    input: Any


@dataclass(frozen=True)
class Pair:
    """A question and its answer. written: the question as the generator wrote it, before it was made self-contained.

    unit, number: which reply it comes from. held_out: kept for evaluation. dropped: why it is not used, "" if it is.
    """

    unit: int
    number: int
    step: str
    docs: tuple[str, ...]
    question: str
    answer: str
    written: str
    held_out: bool = False
    dropped: str = ""
    prompt: str = ""
    generator: str = ""

    @property
    def key(self) -> tuple[int, int]:
        return self.unit, self.number


@dataclass(frozen=True)
class Cost:
    """Requests and tokens. lost: requests whose reply never came, with their upper bounds in the tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost: int = 0


class Ledger:
    """The file of a build. Raises BuildError for one that is damaged, of another version, or on a full disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        new = not path.exists()
        with self._guarded():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # a kill loses nothing; a power cut the last pairs at most
            if new or not self._db.execute("SELECT name FROM sqlite_master").fetchone():
                with self._transaction():
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO about VALUES ('version', ?)", (str(VERSION),))
            version = self._db.execute("SELECT value FROM about WHERE name = 'version'").fetchone()
        if version is None or version[0] != str(VERSION):
            found = version[0] if version else "none"
            raise BuildError(f"{path}: is of version {found}; this mem_triton reads version {VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = "full" in str(error)
            fix = "make room, the same command goes on" if full else "name another folder, or remove it to begin anew"
            raise BuildError(f"{self.path}: {error}; {fix}") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # on a full disk SQLite has rolled back itself
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Run a transaction, with errors raised as BuildError."""
        with self._guarded(), self._transaction():
            yield

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._guarded():
            return self._db.execute(query, values).fetchall()

    def fix(self, settings: Mapping[str, Any]) -> None:
        """Remember what units are cut by. Raises BuildError where the build was begun with something else."""
        there = dict(self.rows("SELECT name, value FROM about"))
        for name, value in settings.items():
            if there.get(f"set:{name}", str(value)) != str(value):
                was = there[f"set:{name}"]
                raise BuildError(f"{self.path}: was begun with {name} {was}, and is {value} now; name another folder")
        with self.writing():
            for name, value in settings.items():
                self._db.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (f"set:{name}", str(value)))

    def add_documents(self, documents: Iterable[SourceText]) -> int:
        """Take documents in; those whose text changed lose what was made of the old one. Returns how many are new."""
        there, new = dict(self.rows("SELECT id, digest FROM documents")), 0
        for document in documents:
            if there.get(document.id) == document.digest:
                continue
            with self.writing():
                self._forget(document.id)
                values = (document.id, document.source, document.digest, document.text)
                self._db.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", values)
            there[document.id], new = document.digest, new + 1
        return new

    def documents(self) -> list[SourceText]:
        """All documents, by id."""
        return [SourceText(*row) for row in self.rows("SELECT id, source, text FROM documents ORDER BY id")]

    def remove(self, source: str) -> list[str]:
        """Forget a source's documents, or one by its id, and every pair that involves them; returns their ids."""
        query = "SELECT id FROM documents WHERE source = ? OR source LIKE ? || ':%' OR id = ? ORDER BY id"
        ids = [row[0] for row in self.rows(query, source, source, source)]
        for id in ids:
            with self.writing():
                self._forget(id)
        return ids

    def _forget(self, id: str) -> None:
        involved = "SELECT id FROM units WHERE EXISTS (SELECT 1 FROM json_each(units.docs) WHERE value = ?)"
        self._db.execute(f"DELETE FROM pairs WHERE unit IN ({involved})", (id,))
        self._db.execute(f"DELETE FROM units WHERE id IN ({involved})", (id,))
        self._db.execute("DELETE FROM documents WHERE id = ?", (id,))

    def plan(self, step: str, units: Iterable[tuple[Sequence[str], Any]]) -> None:
        """Add a step's units, (documents, input) each, that are not there yet."""
        with self.writing():
            for docs, said in units:
                text = json.dumps(said, ensure_ascii=False)
                named = json.dumps(list(docs), ensure_ascii=False)
                key = hashlib.sha256(f"{named}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
                self._db.execute(
                    "INSERT OR IGNORE INTO units (step, key, docs, input) VALUES (?, ?, ?, ?)", (step, key, named, text)
                )

    def open_units(self, step: str) -> list[Unit]:
        """Units that are neither done nor failed, in their order."""
        found = self.rows("SELECT id, docs, input FROM units WHERE step = ? AND state = 'open' ORDER BY id", step)
        return [Unit(id, step, tuple(json.loads(docs)), json.loads(said)) for id, docs, said in found]

    def begin_call(self, unit: int, prompt: int, completion: int) -> int:
        """Count a call with its upper bounds before it is sent; returns its number."""
        with self.writing():
            query = "INSERT INTO calls (unit, prompt_tokens, completion_tokens) VALUES (?, ?, ?)"
            return int(self._db.execute(query, (unit, prompt, completion)).lastrowid or 0)

    def end_call(self, call: int, outcome: str, prompt: int | None, completion: int | None, seconds: float) -> None:
        """Say how a call ended; None keeps the upper bound."""
        query = (
            "UPDATE calls SET outcome = ?, prompt_tokens = coalesce(?, prompt_tokens), "
            "completion_tokens = coalesce(?, completion_tokens), seconds = ? WHERE id = ?"
        )
        with self.writing():
            self._db.execute(query, (outcome, prompt, completion, seconds, call))

    def finish(self, unit: Unit, pairs: Sequence[Pair], changes: Mapping[tuple[int, int], tuple[str, str]]) -> None:
        """A unit is done: its pairs, and (question, why dropped) of pairs that it checked, in one transaction."""
        with self.writing():
            for p in pairs:
                values = (
                    unit.id,
                    p.number,
                    p.step,
                    json.dumps(list(p.docs), ensure_ascii=False),
                    p.question,
                    p.answer,
                    p.written,
                    int(p.held_out),
                    p.dropped,
                    p.prompt,
                    p.generator,
                )
                self._db.execute(f"INSERT INTO pairs VALUES ({', '.join('?' * 11)})", values)
            for (of, number), (question, dropped) in changes.items():
                query = "UPDATE pairs SET question = ?, dropped = ? WHERE unit = ? AND number = ?"
                self._db.execute(query, (question, dropped, of, number))
            self._db.execute("UPDATE units SET state = 'done' WHERE id = ?", (unit.id,))

    def fail(self, unit: Unit, reason: str) -> None:
        """A unit gave nothing that can be used."""
        with self.writing():
            self._db.execute("UPDATE units SET state = 'failed', reason = ? WHERE id = ?", (reason[:500], unit.id))

    def reopen(self) -> None:
        """Units that failed are tried again."""
        with self.writing():
            self._db.execute("UPDATE units SET state = 'open', reason = '' WHERE state = 'failed'")

    def pairs(self, *steps: str, dropped: bool = False) -> list[Pair]:
        """Pairs of these steps, of all if none is named, in the order of their units."""
        where = "" if dropped else " WHERE dropped = ''"
        found = [
            Pair(*row[:3], tuple(json.loads(row[3])), *row[4:7], bool(row[7]), *row[8:])
            for row in self.rows(f"SELECT * FROM pairs{where} ORDER BY unit, number")
        ]
        return [pair for pair in found if not steps or pair.step in steps]

    def cost(self) -> Cost:
        """What all runs have cost."""
        ((requests, prompt, completion, lost),) = self.rows(
            "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
            "coalesce(sum(outcome = 'lost'), 0) FROM calls"
        )
        return Cost(requests, prompt, completion, lost)

    def report(self) -> list[dict[str, Any]]:
        """A row a step: units by their state, requests, tokens, pairs."""
        units = self.rows(
            "SELECT step, count(*), sum(state = 'done'), sum(state = 'failed'), sum(state = 'open') FROM units "
            "GROUP BY step"
        )
        calls = self.rows(
            "SELECT step, count(*), sum(prompt_tokens), sum(completion_tokens) FROM calls "
            "JOIN units ON unit = units.id GROUP BY step"
        )
        pairs = dict(self.rows("SELECT step, sum(dropped = '') FROM pairs GROUP BY step"))
        spent = {step: rest for step, *rest in calls}
        names = ("units", "done", "failed", "open", "requests", "prompt_tokens", "completion_tokens", "pairs")
        return [
            {"step": step, **dict(zip(names, (*counts, *spent.get(step, [0, 0, 0]), pairs.get(step, 0)), strict=True))}
            for step, *counts in units
        ]

    def reasons(self, most: int = 20) -> list[str]:
        """Why units failed."""
        query = "SELECT step, docs, reason FROM units WHERE state = 'failed' ORDER BY id LIMIT ?"
        return [f"{step} of {', '.join(json.loads(docs))}: {reason}" for step, docs, reason in self.rows(query, most)]
