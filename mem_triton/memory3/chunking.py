"""Documents in, references of at most so many tokens out, cut between sentences or words where that is possible."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mem_triton.memory3.encoder import Tokenizer

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|(?=\n)")
_WORD = re.compile(r"\s*\S+|\s+\Z")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")


class DocumentError(ValueError):
    """A source that cannot be read as asked; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Document:
    """One text to write. source: where it is from; name: what ids are made of; offset: of ``text`` in its source."""

    text: str
    source: str = ""
    name: str = "text"
    metadata: dict[str, Any] = field(default_factory=dict)
    offset: int = 0


@dataclass(frozen=True)
class Chunk:
    """A part of a document. text: without blanks around it; token_ids: its own, without special tokens.

    start, end: characters of its document's source. first: its first token in the concatenated tokens of all chunks.
    """

    text: str
    token_ids: tuple[int, ...]
    start: int
    end: int
    first: int = 0


def chunks_of(document: Document, tokenizer: Tokenizer, limit: int, blanks: bool = False) -> list[Chunk]:
    """Cut a document into chunks of at most ``limit`` tokens that cover all of it but blanks.

    Sentences stay together if they fit, then words; a word longer than the limit is cut where the limit falls.
    blanks: the token ids include the blanks before a chunk, so that all chunks' ids together are the document's; a
    chunk's ``token_ids`` may then differ from those of its text alone.
    """
    chunks: list[Chunk] = []
    first = 0
    start = 0
    ends = _pieces(document.text, 0, len(document.text), tokenizer, limit)
    while start < len(document.text):
        end, ids = _longest(document.text, start, ends, tokenizer, limit, blanks)
        text = document.text[start:end]
        if text.strip():
            left = start + len(text) - len(text.lstrip())
            chunks.append(
                Chunk(
                    text.strip(),
                    tuple(ids),
                    document.offset + left,
                    document.offset + start + len(text.rstrip()),
                    first,
                )
            )
            first += len(ids)
        start = end
    return chunks


def _tokens(text: str, tokenizer: Tokenizer, blanks: bool) -> list[int]:
    return tokenizer.encode(text if blanks else text.strip(), add_special_tokens=False)


def _pieces(text: str, start: int, end: int, tokenizer: Tokenizer, limit: int) -> list[tuple[int, int]]:
    """Places where the text may be cut, ascending, each with the tokens since the one before (at most ``limit``)."""
    cuts = sorted({m.end() for m in _SENTENCE_END.finditer(text, start, end)} - {start} | {end})
    pieces: list[tuple[int, int]] = []
    for cut in cuts:
        count = len(tokenizer.encode(text[start:cut], add_special_tokens=False))
        if count <= limit:
            pieces.append((cut, count))
        else:
            pieces += _words(text, start, cut, tokenizer, limit)
        start = cut
    return pieces


def _words(text: str, start: int, end: int, tokenizer: Tokenizer, limit: int) -> Iterator[tuple[int, int]]:
    for match in _WORD.finditer(text, start, end):
        count = len(tokenizer.encode(match.group(), add_special_tokens=False))
        if count <= limit:
            yield match.end(), count
            continue
        size = max(1, (match.end() - match.start()) * limit // (2 * count))  # characters of half the limit, about
        for left in range(match.start(), match.end(), size):
            cut = min(left + size, match.end())
            yield cut, len(tokenizer.encode(text[left:cut], add_special_tokens=False))


def _longest(
    text: str, start: int, ends: list[tuple[int, int]], tokenizer: Tokenizer, limit: int, blanks: bool
) -> tuple[int, list[int]]:
    """Take pieces off ``ends`` while they fit; returns where the chunk ends, and its tokens."""
    taken, total = 0, 0
    while taken < len(ends) and (taken == 0 or total + ends[taken][1] <= limit):
        total += ends[taken][1]
        taken += 1
    while True:  # tokens of pieces add up as a rule, not by law
        end = ends[taken - 1][0]
        ids = _tokens(text[start:end], tokenizer, blanks)
        if len(ids) <= limit:
            del ends[:taken]
            return end, ids
        if taken > 1:
            taken -= 1
        elif end - start > 1:
            middle = (start + end) // 2
            ends.insert(0, (middle, limit))
        else:
            raise DocumentError(f"{text[start:end]!r} alone is {len(ids)} tokens, more than reference_tokens={limit}")


def read_documents(
    path: Path, *, field: str = "text", id_field: str | None = None, format: str | None = None
) -> Iterator[Document]:
    """The documents of a file: a text file is one, a line of JSONL is one, a section of Markdown is one.

    field: JSONL field of the text; id_field: the one of its name; other fields of simple types become metadata.
    format: "text", "jsonl" or "markdown"; None goes by the file's suffix. Raises DocumentError naming file and line.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "text"
    suffixes = {".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "markdown", ".markdown": "markdown"}
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        "text": lambda: iter([Document(_read(path), str(path), name)]),
        "markdown": lambda: _sections(_read(path), str(path), name),
        "jsonl": lambda: _records(path, name, field, id_field),
    }
    format = format or suffixes.get(path.suffix.lower(), "text")
    if format not in readers:
        raise DocumentError(f"format must be one of {', '.join(readers)}, got {format!r}")
    yield from readers[format]()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DocumentError(f"{path}: {error.strerror}") from None


def _records(path: Path, name: str, field: str, id_field: str | None) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DocumentError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            known = (
                ", ".join(k for k, v in record.items() if isinstance(v, str)) if isinstance(record, dict) else "none"
            )
            raise DocumentError(
                f'{path}:{number}: no text field "{field}" (fields with text: {known}); see --jsonl-field'
            )
        if id_field is not None and not isinstance(record.get(id_field), (str, int)):
            raise DocumentError(f'{path}:{number}: no field "{id_field}" with a string or number; see --jsonl-id-field')
        simple = {
            k: v for k, v in record.items() if k not in (field, id_field) and isinstance(v, (str, int, float, bool))
        }
        own = f"{name}.{number}" if id_field is None else re.sub(r"[^A-Za-z0-9._:/-]+", "-", str(record[id_field]))
        yield Document(record[field], f"{path}:{number}", own.strip("-._:/") or f"{name}.{number}", simple)


def _sections(text: str, source: str, name: str) -> Iterator[Document]:
    """Markdown by its headings; a reference's metadata says under which ones it stands."""
    headings: list[tuple[int, str]] = []
    fenced = False
    start = at = 0
    for line in [*text.splitlines(keepends=True), None]:
        heading = None if line is None or fenced else _HEADING.match(line.rstrip("\r\n"))
        if line is None or heading:
            if text[start:at].strip():
                path = {"heading": " > ".join(title for _, title in headings)} if headings else {}
                yield Document(text[start:at], source, name, path, start)
            start = at
        if heading:
            level = len(heading.group(1))
            headings = [*((l, t) for l, t in headings if l < level), (level, heading.group(2))]  # noqa: E741
        if line is not None:
            fenced ^= _FENCE.match(line) is not None
            at += len(line)


def join_tokens(chunks: Sequence[Chunk]) -> list[int]:
    """Token ids of a whole document whose chunks were cut with their blanks."""
    return [token for chunk in chunks for token in chunk.token_ids]
