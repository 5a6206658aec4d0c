"""Files to write, and the ids that are made of their names: no two files get the same one."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mem_triton import ids
from mem_triton.write import Document, DocumentError, read_documents
from mem_triton.write.chunking import printable

SUFFIXES = (".txt", ".md", ".markdown", ".jsonl", ".ndjson")
LONGEST = 100
"""Characters of a name, so that there is room for what ids add to it."""


@dataclass(frozen=True)
class Source:
    """A file, the name that ids are made of, and its bytes."""

    path: Path
    name: str
    size: int


def sources_of(files: Sequence[Path]) -> list[Source]:
    """The files, with folders replaced by the texts in them, each once, in order.

    A file of a folder is called by its path in it, any other by its name; those that would be called the same by their
    path from the folder that they have in common, with their suffix where that is not enough.
    Raises FileNotFoundError, DocumentError for what is neither a file nor a folder.
    """
    found: dict[Path, str] = {}
    for given in files:
        if given.is_dir():
            inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            for path in inside:
                found.setdefault(path, path.relative_to(given).with_suffix("").as_posix())
        elif not given.exists():
            raise FileNotFoundError(f"FILES: there is no {printable(given)}")
        elif stat.S_ISCHR(given.stat().st_mode) and str(given) != "/dev/stdin":
            raise DocumentError(f"FILES: {printable(given)} is a device, give a file or a folder")
        else:
            found.setdefault(given, given.stem)
    paths = _each_once(list(found))
    return [
        Source(path, name, path.stat().st_size)
        for path, name in zip(paths, _names(paths, [found[path] for path in paths]), strict=True)
    ]


def _each_once(paths: list[Path]) -> list[Path]:
    first: dict[Path, Path] = {}
    for path in paths:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def _names(paths: list[Path], short: list[str]) -> list[str]:
    """Names, no two alike; of files that would be called the same, each gets a longer one."""
    longer = [0] * len(paths)
    names = [_id(name) for name in short]
    for level in (1, 2, 3):
        counts = Counter(names)
        again = [i for i, name in enumerate(names) if counts[name] > 1]
        if not again:
            break
        groups = {name: [paths[i].resolve().parent for i in again if names[i] == name] for name in counts}
        roots = {name: os.path.commonpath(parents) for name, parents in groups.items() if parents}
        for i in again:
            longer[i] = level
            path = paths[i].resolve().relative_to(roots[names[i]])
            text = (path if level > 1 else path.with_suffix("")).as_posix()
            unique = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            names[i] = _id(text) if level < 3 else f"{_id(text, LONGEST - 9)}-{unique}"
    return names


def _id(text: str, longest: int = LONGEST) -> str:
    return ids.id_from(text, longest) or "text"


class SourceDocuments:
    """The documents of files; what cannot be read is left out and said in ``problems``, ``failed`` are its files.

    single: a file is one text, whatever is in it. id: instead of the files' names, None for those. Knows how far it is:
    ``file`` is the one that is being read, ``position`` says how much of all is done.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        format: str | None,
        field: str,
        id_field: str | None,
        id: str | None,
        single: bool,
    ) -> None:
        self.sources, self.format, self.field, self.id_field, self.id = sources, format, field, id_field, id
        self.single = single
        self.problems: list[str] = []
        self.failed: set[str] = set()
        self.file = ""
        self.characters = 0  # of texts that were done when the present one began
        self._now, self._size, self._done, self._inside = Document(""), 0, 0, 0

    def __iter__(self) -> Iterator[Document]:
        count = 0
        for source in self.sources:
            self.file, self._size, self._inside = printable(source.path), source.size, 0
            before = len(self.problems)
            try:
                for document in self._read(source):
                    count += 1
                    if self.id is not None and self.single and count > 1:
                        raise IdError(
                            f"--id: {self.id} would name several texts; write them one by one, or leave it out"
                        )
                    self._now = document
                    yield document
                    self._inside += len(document.text.encode(errors="replace"))
            except DocumentError as error:
                self.problems.append(str(error))
            if len(self.problems) > before:
                self.failed.add(self.file)
            self._done, self._size, self._inside, self._now = self._done + source.size, 0, 0, Document("")

    def _read(self, source: Source) -> Iterator[Document]:
        # a whole text is a whole file: Markdown is not cut into its sections
        whole = self.single and self.format is None and source.path.suffix.lower() in (".md", ".markdown")
        documents = read_documents(
            source.path,
            field=self.field,
            id_field=self.id_field,
            format="text" if whole else self.format,
            name=source.name,
            problems=self.problems,
        )
        for document in documents:
            yield document if self.id is None else Document(**{**vars(document), "name": self.id, "named": True})

    def position(self, share: float) -> int:
        """Bytes that are done, of all files. share: of the present text."""
        now = self._inside + share * len(self._now.text.encode(errors="replace"))
        return self._done + min(self._size, int(now))

    @property
    def present(self) -> Document:
        """The text that is being written."""
        return self._now


class IdError(ValueError):
    """One id for several texts."""
