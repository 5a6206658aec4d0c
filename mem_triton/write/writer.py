"""Texts into a bank: chunked, encoded in batches, sparsified and committed, every few seconds or texts.

What is in the bank already, by content, is left alone. So a write that was killed is resumed by starting it again, and
a second write adds nothing. A text that cannot be written is reported and left out; the others are written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mem_triton.store.bank import Bank, BankError, EntryInfo, NewEntry, UnknownEntryError
from mem_triton.store.bank.documents import describe, file_of
from mem_triton.store.block import MemoryBlock
from mem_triton.write.chunking import Document, DocumentError, unusable
from mem_triton.write.config import WriteConfig, prefix_ids
from mem_triton.write.encoder import EncodedText, Encoder, Tokenizer
from mem_triton.write.items import SEAM, Item, parallel_items, sparse_items, whole_item, window_limit
from mem_triton.write.known import look_up, same_file
from mem_triton.write.report import WriteReport
from mem_triton.write.sparsify import dense, sparsify
from mem_triton.write.spec import check_same, config_of

logger = logging.getLogger(__name__)


class Writer:
    """Writes documents into ``bank``, which must be open for writing.

    encoder: the bank's model; tokenizer: that model's. config: how the bank was made; None for what its specification
    says. batch_size: texts that share a forward; one by default, so that a text's block does not depend on its company.
    commit, commit_tokens, commit_seconds: a transaction ends with so many entries, tokens or seconds.
    written: ids that are current for what was written or found, failed: files of which something was not written.
    Raises BankError naming the field in which ``config`` differs from the bank.

    Example::

        with Bank.create("facts", bank_spec(config, model_fingerprint(folder))) as bank:
            report = Writer(bank, encoder, tokenizer, config).write(read_documents(Path("facts.md")))
    """

    def __init__(
        self,
        bank: Bank,
        encoder: Encoder | None,
        tokenizer: Tokenizer,
        config: WriteConfig | None = None,
        *,
        batch_size: int = 1,
        commit: int = 64,
        commit_tokens: int = 16384,
        commit_seconds: float = 10.0,
    ) -> None:
        spec = bank.spec
        self.bank, self.encoder, self.tokenizer = bank, encoder, tokenizer
        self.config = config or config_of(spec)
        self.batch_size, self.commit = batch_size, commit
        self.commit_tokens, self.commit_seconds = commit_tokens, commit_seconds
        self.written: set[str] = set()
        self.failed: set[str] = set()
        self._waiting: list[Item] = []  # for the model
        self._ready: list[Item] = []  # for the next transaction
        self._moved: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._given: dict[str, tuple[str, str]] = {}  # id of a whole text -> its content and source, in this run
        self._window: tuple[tuple[int, ...], EncodedText] | None = None  # the last one encoded
        self._committed = 0.0
        check_same(self.config, spec)
        self.prefix = [] if spec.kind == "prefix" else prefix_ids(tokenizer, spec.prefix_text)
        self._special = set(tokenizer.all_special_ids)
        if encoder is not None and encoder.num_layers != spec.fingerprint.num_layers:
            raise BankError(f"the bank's model has {spec.fingerprint.num_layers} layers, this one {encoder.num_layers}")

    def write(
        self,
        documents: Iterable[Document],
        *,
        tenant: str = "",
        cold: bool = False,
        replace: bool = False,
        progress: Callable[[WriteReport], None] | None = None,
    ) -> WriteReport:
        """Write every document. cold: store the texts alone; their keys and values follow when they are first needed.

        replace: an id that was made of a file's name may take the place of another file's entry. progress: called after
        each text. Raises BankError for the bank's faults, and what ``documents`` raises.
        """
        if cold and self.config.context == "document":
            raise BankError('cold entries are encoded alone later: they cannot have context="document"')
        began, report = time.monotonic(), WriteReport()
        self._committed = began
        self._waiting, self._ready, self._moved, self._given = [], [], {}, {}

        def said() -> None:
            report.seconds = time.monotonic() - began
            if progress:
                progress(report)

        self._write_sink()
        for document in documents:
            for item in self._usable_items(document, tenant, report):
                if self._take(item, document, cold, replace, report):
                    self._go_on(cold, report)
                said()
        self._encode_waiting(report)
        self._commit(cold, report)
        said()
        return report

    def _usable_items(self, document: Document, tenant: str, report: WriteReport) -> list[Item]:
        """The document's texts; none if it is blank or cannot be written, which the report then says."""
        try:
            if (reason := unusable(document)) is not None:
                raise DocumentError(reason)
            items = list(self._items(document, tenant))
        except DocumentError as error:
            self._fail(document.source, str(error), report)
            return []
        if not items:
            report.empty += 1
            report.characters += len(document.text)
        return items

    def _fail(self, source: str, reason: str, report: WriteReport) -> None:
        problem = f"{source}: {reason}" if source else reason
        logger.debug("not written: %s", problem)
        report.problems.append(problem)
        self.failed.add(file_of(source))

    def _take(self, item: Item, document: Document, cold: bool, replace: bool, report: WriteReport) -> bool:
        """Put an item on its way; False if it is there already or cannot be written."""
        entry, on_its_way = item.entry, self._on_its_way(item)
        first, source = self._given.setdefault(entry.id, (item.digest, entry.source))
        if first != item.digest:
            self._fail(entry.source, f'id "{entry.id}" was given by {source or "another text"} already', report)
            return False
        if on_its_way is not None:
            self._skip(item, on_its_way.entry.id, report)
            return False
        known = look_up(self.bank, entry, item.digest, named=document.named, replace=replace)
        if known.here is not None and (known.here.has_block or cold):
            self._skip(item, known.here.id, report, known.here.ref)
            if known.here.id == entry.id and same_file(known.here.source, entry.source):
                self._move(known.here, entry)
            return False
        reason = known.obstacle or self._too_long(item)
        if reason is not None:
            self._fail(entry.source, reason, report)
            return False
        item.ref = known.here.ref if known.here is not None else None
        item.copy = known.copy.ref if known.copy is not None else None
        self.written.add(known.here.id if known.here is not None else entry.id)
        if cold or item.copy:
            report.characters += item.characters
            report.tokens += len(item.ids)
            self._ready.append(item)
        else:
            self._waiting.append(item)
        return True

    def _on_its_way(self, item: Item) -> Item | None:
        shared = self.config.kind != "prefix"
        for other in (*self._waiting, *self._ready):
            if other.digest == item.digest and (
                other.entry.id == item.entry.id or (shared and same_file(other.entry.source, item.entry.source))
            ):
                return other
        return None

    def _skip(self, item: Item, id: str, report: WriteReport, ref: str | None = None) -> None:
        report.skipped += 1
        report.characters += item.characters
        self.written.add(id)
        if id != item.entry.id:
            report.elsewhere.append(f"{item.entry.source or item.entry.id}: {ref or id}")

    def _move(self, there: EntryInfo, entry: NewEntry) -> None:
        if (there.source, there.metadata) != (entry.source, dict(entry.metadata)):
            self._moved[there.ref] = (entry.source, entry.metadata)

    def _too_long(self, item: Item) -> str | None:
        most = None if self.encoder is None else self.encoder.max_tokens
        count = len(self.prefix) + len(item.ids)
        if most is None or item.window is not None or count <= most:
            return None
        return f"{count} tokens, the model takes {most}; split it, or write it into a bank of references"

    def _go_on(self, cold: bool, report: WriteReport) -> None:
        """Run the model on a full batch, and end the transaction when it is time."""
        if len(self._waiting) >= self.batch_size:
            self._encode_waiting(report)
        items = len(self._ready) + len(self._waiting)
        tokens = sum(len(item.ids) for item in (*self._ready, *self._waiting))
        late = time.monotonic() - self._committed >= self.commit_seconds
        if items >= self.commit or tokens >= self.commit_tokens or late:
            self._encode_waiting(report)
            self._commit(cold, report)

    def _encode_waiting(self, report: WriteReport) -> None:
        if not self._waiting:
            return
        for item, block in zip(self._waiting, self._blocks(self._waiting), strict=True):
            item.block = block
            report.characters += item.characters
            report.tokens += len(item.ids)
        self._ready += self._waiting
        self._waiting = []

    def fill(self, refs: Sequence[str]) -> list[str]:
        """Encode cold entries and store what comes of them (the paper's cold start); filled ones are left alone.

        Returns the references that have a block now and had none.
        """
        self._write_sink()
        infos = [self.bank.resolve(ref, any_tenant=True) for ref in dict.fromkeys(refs)]
        items = [self._cold_item(info) for info in infos if not info.has_block]
        blocks = {item.ref: block for item, block in zip(items, self._blocks(items), strict=True) if block is not None}
        if blocks:
            self.bank.fill_all(blocks)
        return list(blocks)

    def _cold_item(self, info: EntryInfo) -> Item:
        ids = self.bank.token_ids(info.ref)
        if not ids:
            text = info.text + SEAM if self.config.kind == "parallel" else info.text
            ids = self.tokenizer.encode(text, add_special_tokens=self.config.kind == "prefix")
        return Item(NewEntry(info.id, info.text, source=info.source), list(ids), 0, ref=info.ref)

    def fill_cold(self, progress: Callable[[WriteReport], None] | None = None) -> WriteReport:
        """Encode all cold entries of the bank; those that the model cannot read are reported."""
        began, report = time.monotonic(), WriteReport()
        after = None
        while cold := self.bank.list(after=after, limit=self.commit, only_cold=True):
            fits, tokens = [], 0
            for info in cold:
                item = self._cold_item(info)
                if fits and tokens + len(item.ids) > self.commit_tokens:
                    break  # the next transaction's
                after = info.id
                report.characters += len(info.text)
                if (reason := self._too_long(item)) is not None:
                    self._fail(info.source or info.ref, reason, report)
                    continue
                fits.append(info.ref)
                tokens += len(item.ids)
            filled = self.fill(fits)
            report.filled += filled
            report.empty += len(fits) - len(filled)
            report.tokens += tokens
            report.seconds = time.monotonic() - began
            if progress:
                progress(report)
        return report

    def _write_sink(self) -> None:
        spec = self.bank.spec
        if spec.prefix_text is None or not self.prefix or self.bank.sink() is not None:
            return
        self.bank.set_sink(dense(self._encoder().encode([self.prefix])[0]))

    def _items(self, document: Document, tenant: str) -> Iterator[Item]:
        if not document.text.strip():
            return
        if self.config.kind == "parallel":
            yield from parallel_items(document, self.tokenizer, self.config, tenant)
        elif self.config.kind == "memory3":
            whole = self.config.context == "document"
            limit = window_limit(self.config, self._encoder().max_tokens, len(self.prefix)) if whole else None
            yield from sparse_items(document, self.tokenizer, self.config, tenant, limit)
        elif (item := whole_item(document, self.tokenizer, tenant)) is not None:
            yield item

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise BankError("this writer has no model: it can only write cold entries")
        return self.encoder

    def _commit(self, cold: bool, report: WriteReport) -> None:
        items, moved = self._ready, self._moved
        self._ready, self._moved, self._committed = [], {}, time.monotonic()
        new, fills = [], {}
        for item in items:
            block = self._copied(item) if item.copy and not cold else item.block
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
        if moved:
            describe(self.bank, moved)

    def _copied(self, item: Item) -> MemoryBlock:
        try:
            return self.bank.load(item.copy)
        except UnknownEntryError:  # its text changed in this very run
            (block,) = self._blocks([item])
            return block

    def _blocks(self, items: Sequence[Item]) -> list[MemoryBlock | None]:
        """Each item's block, None if none of its tokens may be kept."""
        return [self._block(item, text) for item, text in zip(items, self._encode(items), strict=True)]

    def _encode(self, items: Sequence[Item]) -> Iterator[EncodedText]:
        options: dict[str, Any] = {"layers": self.bank.spec.layers, "prefix_ids": self.prefix}
        alone = [i for i, item in enumerate(items) if item.window is None]
        for start in range(0, len(alone), self.batch_size):
            part = [items[i] for i in alone[start : start + self.batch_size]]
            yield from self._encoder().encode([item.ids for item in part], batch_size=self.batch_size, **options)
        for item in items:
            if item.window is not None:
                if (
                    self._window is None or item.window is not self._window[0]
                ):  # a window's references follow each other
                    self._window = item.window, self._encoder().encode([item.window], **options)[0]
                yield self._window[1].slice(item.first, item.first + len(item.ids))

    def _block(self, item: Item, text: EncodedText) -> MemoryBlock | None:
        if self.config.kind in ("prefix", "parallel"):
            return dense(text)
        valid = [token not in self._special for token in item.ids]
        if not any(valid):
            return None
        keep, scale = self.config.keep_tokens, self._encoder().scale
        return sparsify(text, keep, scale=scale, selection=self.config.selection, valid=valid)
