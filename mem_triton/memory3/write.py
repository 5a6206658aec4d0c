"""Texts into a bank: chunked, encoded in batches, sparsified and committed, group by group.

What is in the bank already, by content, is left alone. So a write that was killed is resumed by starting it again, and
a second write adds nothing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mem_triton.memory3.chunking import Chunk, Document, chunks_of, join_tokens
from mem_triton.memory3.config import WriteConfig, prefix_ids
from mem_triton.memory3.encoder import EncodedText, Encoder, Tokenizer
from mem_triton.memory3.sparsify import dense, sparsify
from mem_triton.store.bank import Bank, BankError, BankSpec, NewEntry, content_hash
from mem_triton.store.block import MemoryBlock
from mem_triton.store.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


def bank_spec(
    config: WriteConfig, fingerprint: Fingerprint, *, codec: str = "bf16", embedder: str = "lexical"
) -> BankSpec:
    """The specification of a bank that ``config`` writes with the model of ``fingerprint``."""
    memory3 = config.kind == "memory3"
    return BankSpec(
        kind=config.kind,
        fingerprint=fingerprint,
        layers=config.layer_indices(fingerprint.num_layers),
        kv_heads=fingerprint.kv_heads,
        head_dim=fingerprint.head_dim,
        reference_tokens=config.reference_tokens,
        keep_tokens=config.keep_tokens if memory3 else None,
        codec=codec,
        dtype=fingerprint.dtype,
        embedder=embedder,
        prefix_text=config.prefix_text if memory3 else None,
    )


@dataclass
class WriteReport:
    """What a write did. added, filled: references of new entries, and of cold ones that got their block; skipped: texts
    that were there already; empty: texts of which no token may be kept; characters: text that is done with.
    """

    added: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    skipped: int = 0
    empty: int = 0
    tokens: int = 0
    characters: int = 0
    seconds: float = 0.0


@dataclass
class _Item:
    """A text on its way. ids: its tokens. window: those to run, None for ``ids``; its own start at ``first``.

    ref: the cold entry that waits for it.
    """

    entry: NewEntry
    ids: list[int]
    characters: int
    window: tuple[int, ...] | None = None
    first: int = 0
    ref: str | None = None


class Writer:
    """Writes documents into ``bank``, which must be open for writing.

    encoder: the bank's model; tokenizer: that model's. config: how the bank was made; None for what its specification
    says. batch_size: texts that share a forward; one by default, so that a text's block does not depend on its company.
    commit: entries of one transaction.
    Raises BankError naming the field in which ``config`` differs from the bank.

    Example::

        with Bank.create("facts", bank_spec(config, model_fingerprint(folder))) as bank:
            report = Writer(bank, encoder, tokenizer, config).write(read_documents(Path("facts.md")))
    """

    def __init__(
        self, bank: Bank, encoder: Encoder | None, tokenizer: Tokenizer, config: WriteConfig | None = None,
        *, batch_size: int = 1, commit: int = 64,
    ) -> None:  # fmt: skip
        spec = bank.spec
        self.bank, self.encoder, self.tokenizer = bank, encoder, tokenizer
        self.config = config or config_of(spec)
        self.batch_size, self.commit = batch_size, commit
        _check_same(self.config, spec)
        self.prefix = [] if spec.kind == "prefix" else prefix_ids(tokenizer, spec.prefix_text)
        self._special = set(tokenizer.all_special_ids)
        if encoder is not None and encoder.num_layers != spec.fingerprint.num_layers:
            raise BankError(f"the bank's model has {spec.fingerprint.num_layers} layers, this one {encoder.num_layers}")

    def write(
        self, documents: Iterable[Document], *, tenant: str = "", cold: bool = False,
        progress: Callable[[WriteReport], None] | None = None,
    ) -> WriteReport:  # fmt: skip
        """Write every document. cold: store the texts alone; their keys and values follow when they are first needed.

        progress: called after each transaction. Raises DocumentError for unreadable sources, BankError for the bank's.
        """
        if cold and self.config.context == "document":
            raise BankError('cold entries are encoded alone later: they cannot have context="document"')
        began, report = time.monotonic(), WriteReport()
        self._write_sink()
        group: dict[str, _Item] = {}
        for item in self._items(documents, tenant):
            digest = item.entry.content_hash
            item.ref = self.bank.find_hash(digest, tenant)
            waits = item.ref is not None and not cold and not self.bank.resolve(item.ref, tenant=tenant).has_block
            if digest in group or (item.ref is not None and not waits):
                report.skipped += 1
                report.characters += item.characters
                continue
            group[digest] = item
            if len(group) >= self.commit:
                self._commit(list(group.values()), cold, report)
                group = {}
                report.seconds = time.monotonic() - began
                if progress:
                    progress(report)
        self._commit(list(group.values()), cold, report)
        report.seconds = time.monotonic() - began
        if progress:
            progress(report)
        return report

    def fill(self, refs: Sequence[str]) -> None:
        """Encode cold entries and store what comes of them (the paper's cold start); filled ones are left alone."""
        self._write_sink()
        infos = [self.bank.resolve(ref, any_tenant=True) for ref in dict.fromkeys(refs)]
        items = []
        for info in infos:
            if not info.has_block:
                ids = self.bank.token_ids(info.ref) or self._text_ids(info.text)
                items.append(_Item(NewEntry(info.id, info.text, source=info.source), list(ids), 0, ref=info.ref))
        blocks = {item.ref: block for item, block in zip(items, self._blocks(items), strict=True) if block is not None}
        if blocks:
            self.bank.fill_all(blocks)

    def fill_cold(self, progress: Callable[[WriteReport], None] | None = None) -> WriteReport:
        """Encode all cold entries of the bank."""
        began, report = time.monotonic(), WriteReport()
        after = None
        while cold := self.bank.list(after=after, limit=self.commit, only_cold=True):
            self.fill([info.ref for info in cold])
            report.filled += [info.ref for info in cold]
            report.characters += sum(len(info.text) for info in cold)
            report.seconds = time.monotonic() - began
            after = cold[-1].id
            if progress:
                progress(report)
        return report

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=self.config.kind == "prefix")

    def _write_sink(self) -> None:
        spec = self.bank.spec
        if spec.prefix_text is None or not self.prefix or self.bank.sink() is not None:
            return
        self.bank.set_sink(dense(self._encoder().encode([self.prefix])[0]))

    def _items(self, documents: Iterable[Document], tenant: str) -> Iterator[_Item]:
        for document in documents:
            if self.config.kind == "prefix":
                ids = self._text_ids(document.text)
                if ids:
                    entry = NewEntry(
                        document.name, document.text, source=document.source, metadata=document.metadata,
                        tenant=tenant, token_ids=ids,
                    )  # fmt: skip
                    yield _Item(entry, ids, len(document.text))
            else:
                yield from self._references(document, tenant)

    def _references(self, document: Document, tenant: str) -> Iterator[_Item]:
        whole = self.config.context == "document"
        chunks = chunks_of(document, self.tokenizer, self.config.reference_tokens, blanks=whole)
        key = "" if self.config.selection == "softmax" else f"selection={self.config.selection}"
        windows: Mapping[int, tuple[tuple[int, ...], int]] = {}
        if whole:
            key += f" document={hashlib.sha256(document.text.encode()).hexdigest()}"
            windows = _windows(chunks, self._window_limit())
        for i, chunk in enumerate(chunks):
            digest = content_hash(chunk.text, chunk.token_ids, key)
            entry = NewEntry(
                f"{document.name[:100]}:{hashlib.sha256(f'{tenant}|{digest}'.encode()).hexdigest()[:12]}",
                chunk.text,
                source=document.source,
                metadata={**document.metadata, "start": chunk.start, "end": chunk.end},
                tenant=tenant,
                token_ids=list(chunk.token_ids),
                content_key=key,
            )
            window, first = windows.get(i, (None, 0))
            yield _Item(entry, list(chunk.token_ids), chunk.end - chunk.start, window, first)

    def _window_limit(self) -> int:
        longest = self._encoder().max_tokens
        limit = self.config.window_tokens if longest is None else min(longest, self.config.window_tokens)
        limit -= len(self.prefix)
        if limit < 2 * self.config.reference_tokens:
            raise BankError(
                f"window_tokens: {limit} tokens hold no two references of {self.config.reference_tokens}; "
                "enlarge it, or write shorter references"
            )
        return limit

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise BankError("this writer has no model: it can only write cold entries")
        return self.encoder

    def _commit(self, items: list[_Item], cold: bool, report: WriteReport) -> None:
        blocks = [None] * len(items) if cold else self._blocks(items)
        new, fills = [], {}
        for item, block in zip(items, blocks, strict=True):
            report.characters += item.characters
            report.tokens += len(item.ids)
            if block is None and not cold:
                report.empty += 1
                logger.warning("%s: %r has no token that may be kept", item.entry.source, item.entry.text[:40])
            elif item.ref is not None:
                fills[item.ref] = block
            else:
                new.append(NewEntry(**{**vars(item.entry), "block": block}))
        if fills:
            self.bank.fill_all(fills)
            report.filled += fills
        known = [self.bank.knows(entry.id, tenant=entry.tenant) for entry in new]
        if not all(known):
            report.added += self.bank.add([entry for entry, old in zip(new, known, strict=True) if not old])
        for entry, old in zip(new, known, strict=True):
            if old:  # a prefix whose text has changed
                report.added.append(self.bank.update(entry.id, entry))

    def _blocks(self, items: Sequence[_Item]) -> list[MemoryBlock | None]:
        """Each item's block, None if none of its tokens may be kept."""
        return [self._block(item, text) for item, text in zip(items, self._encode(items), strict=True)]

    def _encode(self, items: Sequence[_Item]) -> Iterator[EncodedText]:
        options: dict[str, Any] = {"layers": self.bank.spec.layers, "prefix_ids": self.prefix}
        alone = [i for i, item in enumerate(items) if item.window is None]
        window, encoded = None, None
        for start in range(0, len(alone), self.batch_size):
            part = [items[i] for i in alone[start : start + self.batch_size]]
            yield from self._encoder().encode([item.ids for item in part], batch_size=self.batch_size, **options)
        for item in items:
            if item.window is not None:
                if item.window is not window:  # the references of one window follow each other
                    window, encoded = item.window, self._encoder().encode([item.window], **options)[0]
                yield encoded.slice(item.first, item.first + len(item.ids))

    def _block(self, item: _Item, text: EncodedText) -> MemoryBlock | None:
        if self.config.kind == "prefix":
            return dense(text)
        valid = [token not in self._special for token in item.ids]
        if not any(valid):
            return None
        keep, scale = self.config.keep_tokens, self._encoder().scale
        return sparsify(text, keep, scale=scale, selection=self.config.selection, valid=valid)


def config_of(spec: BankSpec) -> WriteConfig:
    """The choices that a bank's specification records; the others are the defaults."""
    return WriteConfig(
        kind=spec.kind, layers=spec.layers, keep_tokens=spec.keep_tokens, reference_tokens=spec.reference_tokens,
        prefix_text=spec.prefix_text,
    )  # fmt: skip


def _check_same(config: WriteConfig, spec: BankSpec) -> None:
    wanted = bank_spec(config, spec.fingerprint)
    names = ("kind", "layers", *(("keep_tokens", "reference_tokens", "prefix_text") if spec.kind == "memory3" else ()))
    for name in names:
        has, asked = getattr(spec, name), getattr(wanted, name)
        if has != asked:
            raise BankError(f"{name}: the bank has {has!r}, asked for {asked!r}; leave it out, or write another bank")


def _windows(chunks: Sequence[Chunk], limit: int) -> dict[int, tuple[tuple[int, ...], int]]:
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
