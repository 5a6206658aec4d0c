"""Documents in, references of at most so many tokens out, cut between sentences or words where that is possible."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mem_triton import ids
from mem_triton.write.encoder import Tokenizer

SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|(?=\n)")
_WORD = re.compile(r"\s*\S+|\s+\Z")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")


class DocumentError(ValueError):
    """A source that cannot be read as asked; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Document:
    """One text to write. source: where it is from; name: what ids are made of; offset: of ``text`` in its source.

    named: somebody chose the name; False if it was made of a file's.
    """

    text: str
    source: str = ""
    name: str = "text"
    metadata: dict[str, Any] = field(default_factory=dict)
    offset: int = 0
    named: bool = True


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
    cuts = sorted({m.end() for m in SENTENCE_END.finditer(text, start, end)} - {start} | {end})
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
    path: Path,
    *,
    field: str = "text",
    id_field: str | None = None,
    format: str | None = None,
    name: str | None = None,
    problems: list[str] | None = None,
) -> Iterator[Document]:
    """Give the documents of a file: a text file, a line of JSONL and a section of Markdown are one each.

    field: JSONL field of the text; id_field: the one of its name; other fields of simple types become metadata.
    format: "text", "jsonl" or "markdown"; None goes by the file's suffix. name: what ids are made of, None for the
    file's. problems: takes what is wrong with lines of JSONL, which are then left out; None raises at the first.
    Raises DocumentError naming file and line.
    """
    name = name or ids.id_from(path.stem) or "text"
    source = printable(path)
    suffixes = {".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "markdown", ".markdown": "markdown"}
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        "text": lambda: iter([Document(_read(path), source, name, named=False)]),
        "markdown": lambda: _sections(_read(path), source, name),
        "jsonl": lambda: _records(_read(path), source, name, field, id_field, problems),
    }
    format = format or suffixes.get(path.suffix.lower(), "text")
    if format not in readers:
        raise DocumentError(f"format must be one of {', '.join(readers)}, got {format!r}")
    yield from readers[format]()


def printable(path: Path) -> str:
    """A path as text; bytes of its name that are no UTF-8 are written as "\\xff"."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def unusable(document: Document) -> str | None:
    """Why a document cannot be stored (half of a surrogate pair, metadata that JSON does not have), None if it can."""
    for what, text in (("text", document.text), ("id", document.name)):
        if (at := _half_pair(text)) is not None:
            return f"{what}: character {at} is half of a surrogate pair ({text[at]!r}), which is no text; correct it"
    try:
        json.dumps(document.metadata, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"metadata: holds half of a surrogate pair ({error.object[error.start]!r}); correct it"
    except (TypeError, ValueError) as error:
        return f"metadata: {error}; JSON has no such value"
    return None


def _half_pair(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{printable(path)}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (OSError, ValueError) as error:
        raise DocumentError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from None


def _records(
    text: str, source: str, name: str, field: str, id_field: str | None, problems: list[str] | None
) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _record(line, f"{source}:{number}", f"{name}.{number}", field, id_field)
        except DocumentError as error:
            if problems is None:
                raise
            problems.append(str(error))


def _record(line: str, source: str, name: str, field: str, id_field: str | None) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DocumentError(f"{source}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{source}: not JSON that can be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        known = ", ".join(k for k, v in record.items() if isinstance(v, str)) if isinstance(record, dict) else "none"
        raise DocumentError(f'{source}: no text field "{field}" (fields with text: {known}); see --jsonl-field')
    own = None
    if id_field is not None:
        if not isinstance(record.get(id_field), (str, int)):
            raise DocumentError(f'{source}: no field "{id_field}" with a string or number; see --jsonl-id-field')
        own = ids.id_from(str(record[id_field])) or None
    simple = {k: v for k, v in record.items() if k not in (field, id_field) and isinstance(v, (str, int, float, bool))}
    document = Document(record[field], source, own or name, simple, named=own is not None)
    if (reason := unusable(document)) is not None:
        raise DocumentError(f"{source}: {reason}")
    return document


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
                yield Document(text[start:at], source, name, path, start, named=False)
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
