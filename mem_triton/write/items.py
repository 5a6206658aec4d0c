"""Documents to the texts that a bank keeps an entry of: whole ones, sparse references, dense ones side by side."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mem_triton.store.bank import BankError, NewEntry, content_hash
from mem_triton.store.bank.documents import reference_id
from mem_triton.store.block import MemoryBlock
from mem_triton.write.chunking import SENTENCE_END, Chunk, Document, chunks_of, join_tokens
from mem_triton.write.config import WriteConfig
from mem_triton.write.encoder import Tokenizer

SEAM = "\n"
"""What stands between an entry's text and what comes next, so that the tokens of both stay as they are."""
LONGEST_TITLE = 100
"""Characters of a document's first line that still make a title."""


@dataclass
class Item:
    """A text on its way. ids: its tokens. window: those to run, None for ``ids``; its own start at ``first``.

    ref: the cold entry that waits for it. copy: an entry with the same block. block: what was made of it.
    """

    entry: NewEntry
    ids: list[int]
    characters: int
    window: tuple[int, ...] | None = None
    first: int = 0
    ref: str | None = None
    copy: str | None = None
    block: MemoryBlock | None = None

    @cached_property
    def digest(self) -> str:
        """The entry's content hash."""
        return self.entry.content_hash


def whole_item(document: Document, tokenizer: Tokenizer, tenant: str) -> Item | None:
    """A document as one entry; None if it has no tokens."""
    if not (ids := tokenizer.encode(document.text, add_special_tokens=True)):
        return None
    entry = NewEntry(
        document.name, document.text, source=document.source, metadata=document.metadata, tenant=tenant, token_ids=ids
    )
    return Item(entry, ids, len(document.text))


def sparse_items(
    document: Document, tokenizer: Tokenizer, config: WriteConfig, tenant: str, window_tokens: int | None
) -> Iterator[Item]:
    """Memory³'s references. window_tokens: that the model reads at once of a whole document, where it is encoded so."""
    whole = config.context == "document"
    chunks = chunks_of(document, tokenizer, config.reference_tokens, blanks=whole)
    key = "" if config.selection == "softmax" else f"selection={config.selection}"
    windows: Mapping[int, tuple[tuple[int, ...], int]] = {}
    if window_tokens is not None:
        key += f" document={hashlib.sha256(document.text.encode()).hexdigest()}"
        windows = windows_of(chunks, window_tokens)
    for i, chunk in enumerate(chunks):
        item = _reference(document, chunk.text, chunk.token_ids, (chunk.start, chunk.end), tenant, key)
        item.window, item.first = windows.get(i, (None, 0))
        yield item


def window_limit(config: WriteConfig, longest: int | None, prefix_tokens: int) -> int:
    """Tokens of a document that are encoded at once. longest: of the model. Raises BankError if they are too few."""
    limit = config.window_tokens if longest is None else min(longest, config.window_tokens)
    limit -= prefix_tokens
    if limit < 2 * config.reference_tokens:
        raise BankError(
            f"window_tokens: {limit} tokens hold no two references of {config.reference_tokens}; "
            "enlarge it, or write shorter references"
        )
    return limit


def parallel_items(document: Document, tokenizer: Tokenizer, config: WriteConfig, tenant: str) -> Iterator[Item]:
    """References that are read whole: with their title, the end of what came before, and a seam behind them.

    The title is the document's ``title`` or ``heading``; in parts after the first of one that has none, its first line.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text + SEAM, add_special_tokens=False)

    limit, own = config.reference_tokens, _title(document)
    titled = f"{own}\n{document.text.strip()}" if own else document.text.strip()
    if own and 4 * len(ids(own)) > limit:
        own, titled = "", document.text.strip()
    if len(tokens := ids(titled)) <= limit:
        start = document.offset + len(document.text) - len(document.text.lstrip())
        span = (start, start + len(document.text.strip()))
        yield _reference(document, titled, tokens, span, tenant)
        return
    title = own or _first_line(document)
    if 4 * len(ids(title)) > limit:
        title = ""
    room = limit - config.overlap_tokens - (len(ids(title)) if title else 0) - len(ids(""))
    for i, chunk in enumerate(chunks_of(document, tokenizer, room)):
        start = chunk.start - document.offset
        begins = _overlap_start(document.text, start, tokenizer, config.overlap_tokens) if i else start
        head = f"{title}\n" if title and (i or own) else ""
        end = chunk.end - document.offset
        text = head + document.text[begins:end].strip()
        if len(tokens := ids(text)) > limit:  # tokens of parts add up as a rule, not by law
            begins, text = start, head + chunk.text
            tokens = ids(text) if len(ids(text)) <= limit else ids(chunk.text)
        yield _reference(document, text, tokens, (document.offset + begins, chunk.end), tenant)


def _title(document: Document) -> str:
    found = document.metadata.get("title") or document.metadata.get("heading")
    found = found.strip() if isinstance(found, str) else ""
    last = found.rpartition(" > ")[2]
    return "" if last and last in document.text[: len(last) + 8] else found  # it begins with it


def _first_line(document: Document) -> str:
    line = document.text.strip().partition("\n")[0].strip()
    return line if len(line) <= LONGEST_TITLE else ""


_BLANKS = re.compile(r"\s+")


def _overlap_start(text: str, start: int, tokenizer: Tokenizer, most: int) -> int:
    """Where the ``most`` tokens before ``start`` begin: at a sentence if one begins among them, else at a word."""
    if not most:
        return start
    left = max(0, start - 16 * most)  # more characters than so many tokens have, as a rule
    for pattern in (SENTENCE_END, _BLANKS):
        places = [match.end() for match in pattern.finditer(text, left, start)] + ([0] if left == 0 else [])
        fitting = [
            place
            for place in sorted(places)
            if text[place:start].strip() and len(tokenizer.encode(text[place:start], add_special_tokens=False)) <= most
        ]
        if fitting:
            return fitting[0]
    return start


def _reference(
    document: Document, text: str, ids: Sequence[int], span: tuple[int, int], tenant: str, key: str = ""
) -> Item:
    digest = content_hash(text, ids, key)
    entry = NewEntry(
        reference_id(document.name, hashlib.sha256(f"{tenant}|{digest}".encode()).hexdigest()),
        text,
        source=document.source,
        metadata={**document.metadata, "start": span[0], "end": span[1]},
        tenant=tenant,
        token_ids=list(ids),
        content_key=key,
    )
    return Item(entry, list(ids), span[1] - span[0])


def windows_of(chunks: Sequence[Chunk], limit: int) -> dict[int, tuple[tuple[int, ...], int]]:
    """Chunk -> (tokens to encode, place of its first token among them): windows of ``limit`` that overlap by half."""
    ids = join_tokens(chunks)
    windows: dict[int, tuple[tuple[int, ...], int]] = {}
    start, window = 0, tuple(ids[:limit])
    for i, chunk in enumerate(chunks):
        end = chunk.first + len(chunk.token_ids)
        if end - start > limit:
            start = max(end - limit, chunk.first - limit // 2)
            window = tuple(ids[start : start + limit])
        windows[i] = window, chunk.first - start
    return windows
