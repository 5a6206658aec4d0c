"""Plans what a request reads: resolves ids, takes retrieved references, and claims their pages.

A request reads by a plan: immutable references, and the query positions that see each. The plan travels with it, so any
worker can serve it at any time, and the keys of its prefix say what its KV depends on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from mem_triton import metrics
from mem_triton.schema import ConfigError
from mem_triton.store.bank import BankError, EntryInfo, UnknownEntryError
from mem_triton.store.bank.captured import reader_of
from mem_triton.store.bank.documents import resolve_all
from mem_triton.store.pool.fitting import fitting, most_pages
from mem_triton.store.pool.plan import Attachment
from mem_triton.store.pool.residency import PoolCapacityError, Residency
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit import context
from mem_triton.systems.explicit.captures import Captures
from mem_triton.systems.explicit.chat import ChatFrame
from mem_triton.systems.explicit.head import BankHead
from mem_triton.systems.explicit.layout import layout_of, open_bank
from mem_triton.systems.explicit.reading import Reading
from mem_triton.systems.explicit.request import ReadingRequest
from mem_triton.systems.explicit.retrieval import Retriever
from mem_triton.systems.explicit.searches import Found
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.trained import is_trained, side_by_side
from mem_triton.systems.explicit.user_turn import LastUserMessage, Render
from mem_triton.systems.params import RequestParams
from mem_triton.systems.payload import PageRun, Segment, SystemPayload
from mem_triton.systems.request import RequestError


class ReadingPlans:
    """Resolves, retrieves and claims; one per engine front end.

    decode: token ids to text, None without a tokenizer. obstacle: why this engine, as it is configured, cannot have
    explicit memory; None if it can. render: messages to the chat template's text, None where there is no template.
    frame: how its chats look, asked for when a request is captured. tokenizer: the model's, None without one.
    """

    def __init__(
        self,
        shape: EngineShape,
        section: MemorySection,
        decode: Callable[[list[int]], str] | None,
        obstacle: str | None = None,
        render: Render | None = None,
        frame: Callable[[], ChatFrame | None] = lambda: None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.section, self.obstacle, self.max_model_len = section, obstacle, shape.max_model_len
        self.longest_step = min(shape.max_step_tokens, shape.max_model_len)  # tokens of one request in one step
        self.bank = open_bank(shape, section)
        self.layout = layout_of(shape, section, self.bank.spec)
        self.residency = Residency(self.layout.num_pages, self.layout.page_tokens, self.layout.page_bytes)
        self.bank_key = self.layout.cache_key(self.bank)
        self.decode, self.retriever = decode, None
        self._logger = logging.getLogger(f"{shape.engine.lower()}.mem_triton")
        self.captures = Captures(
            self.bank, self.layout, section.capture, shape.max_model_len, decode, frame, self._logger
        )
        self._said: set[str] = set()
        self.tokenizer = tokenizer
        if section.retrieval is not None:
            if decode is None:
                raise ConfigError("mem_triton.memory.retrieval needs a tokenizer; drop --skip-tokenizer-init")
            r = section.retrieval
            self.last_user_message = LastUserMessage(decode, render, self._logger)
            self.retriever = Retriever(self.bank, decode=decode, every=r.every, min_score=r.min_score)
        self._default = self._pin_default()

    tokenizer: Callable[[], Any] | None = None

    @functools.cached_property
    def head(self) -> BankHead:
        """The head under which the bank's references were written."""
        return BankHead(self.bank, self.tokenizer, self._logger)

    @property
    def sparse(self) -> bool:
        """Whether the bank's references are Memory³'s, of which each part of a text reads its own."""
        return self.bank.spec.kind == "memory3"

    _trained: frozenset[str] = frozenset()
    """References that requests have named, of those whose keys and values were trained."""

    def _remember_trained(self, infos: Sequence[EntryInfo]) -> None:
        if new := {info.ref for info in infos if is_trained(info)} - self._trained:
            self._trained |= new

    @property
    def concerns_all(self) -> bool:
        """Whether requests that say nothing read memory, too."""
        return bool(self._default) or (self.section.retrieval is not None and self.section.retrieval.top_k > 0)

    def _pin_default(self) -> dict[str, int]:
        """What requests read that name nothing, with its tokens; these versions stay on the device.

        An entry that was deleted since the configuration was written is left out, with a warning.
        """
        try:
            infos = [info for id in self.section.default if (info := self._resolve_default(id)) is not None]
            self._remember_trained(infos)
            tokens = {info.ref: info.tokens for info in infos}
            if cold := next((info.ref for info in infos if not info.has_block), None):
                raise ConfigError(
                    f'mem_triton.memory.default: "{cold}" has text but no keys and values; run mem-triton write again'
                )
            plan = tuple(map(Attachment, tokens))
            if (pages := self._most_pages(plan, tokens) + self._head_pages) > self.layout.max_pages:
                raise ConfigError(
                    f"mem_triton.memory.default: need {pages} memory pages, a request may use {self.layout.max_pages}"
                )
            if why := context.beyond(sum(tokens.values()), 1, self.max_model_len):
                raise ConfigError(f"mem_triton.memory.default: {why}")
            if tokens:
                self.residency.pin(tokens)
        except (BankError, PoolCapacityError) as error:
            raise ConfigError(f"mem_triton.memory.default: {error}") from None
        return tokens

    def _resolve_default(self, id: str) -> EntryInfo | None:
        try:
            return self.bank.resolve(id)
        except UnknownEntryError:
            if not self.bank.has_known(id):
                raise
            self._leave_out(id, "it was deleted from the bank")
            return None

    def _leave_out(self, id: str, why: str) -> None:
        metrics.DEFAULTS_LOST.inc()
        self._logger.warning(
            'mem_triton.memory.default: requests are served without "%s": %s; take it out of the configuration', id, why
        )

    def _lose_defaults(self, failed: Set[str]) -> None:
        """Default entries whose keys and values are gone are left out from now on; the server goes on."""
        for ref in failed & self._default.keys():
            del self._default[ref]
            self._leave_out(ref, "its keys and values cannot be read any more")

    def check(self, request: ReadingRequest) -> None:
        """Raise RequestError if the fields name what does not exist."""
        self._top_k(request)
        self._resolve(request)

    def admit(self, request: ReadingRequest, params: RequestParams) -> Reading | None:
        """Check a request's fields; None if it reads and keeps nothing. Raises RequestError, with nothing scheduled."""
        top_k = self._top_k(request)
        refs = self._resolve(request)
        if not refs and not top_k and request.capture is None:
            return None
        field = "mem_ids" if refs else "mem_top_k" if top_k else "mem_capture"
        if self.obstacle:
            raise RequestError(field, self.obstacle)
        if params.unfit:
            raise RequestError(field, f"{params.unfit} cannot use explicit memory; with mem_ids [] they use none")
        reading = Reading(request, tuple(map(Attachment, refs)), top_k, tokens=dict(refs), waits=True)
        self._check_context(reading, 1 if params.prompt_tokens is None else params.prompt_tokens)
        if request.ids is not None and request.top_k is None and self.concerns_all and refs:
            reading.retrieval_note = "off: mem_ids names what to read; with mem_top_k references are retrieved, too"
        if note := side_by_side([ref for ref in refs if ref in self._trained]):
            reading.trained_note = note
            if "trained" not in self._said:
                self._said.add("trained")
                self._logger.warning("mem_ids: %s; further requests of this kind are not told of here", note)
        if top_k and self.section.retrieval.refresh and self.sparse:
            reading.note, reading.refreshes = params.fixed, params.fixed is None
            if reading.note:
                self._count_fixed(reading.note)
        if request.capture is not None:
            reading.capture, reading.reads_answer = self.captures.check(request, params), True
        return reading

    def _count_fixed(self, reason: str) -> None:
        metrics.REFRESH_OFF.labels(reason).inc()
        if reason not in self._said:
            self._said.add(reason)
            self._logger.warning("references are not refreshed while answering: %s", reason)

    def _top_k(self, request: ReadingRequest) -> int:
        if self.section.retrieval is None:
            if request.top_k or request.query is not None:
                field = "mem_top_k" if request.top_k else "mem_query"
                raise RequestError(field, "this server does not retrieve; set mem_triton.memory.retrieval")
            return 0
        named = request.top_k is None and request.ids is not None  # ids of one's own: these and no others
        top_k = 0 if named else self.section.retrieval.top_k if request.top_k is None else request.top_k
        if request.query is not None and not top_k:
            why = "mem_ids names what to read; add mem_top_k for both" if named else "mem_top_k is 0"
            raise RequestError("mem_query", f"nothing is retrieved: {why}")
        return top_k

    def _resolve(self, request: ReadingRequest) -> Mapping[str, int]:
        """The references that a request names, or the default ones, with their tokens."""
        if request.ids is None:
            return self._default
        tokens: dict[str, int] = {}  # by reference: "alice" and "alice@1" may be one entry
        for id in request.ids:
            try:
                named = resolve_all(self.bank, id, tenant=reader_of(id, request.tenant))
            except BankError as error:
                raise RequestError("mem_ids", str(error)) from None
            if any(not info.has_block for info in named):
                raise RequestError("mem_ids", f'"{id}" has text but no keys and values yet; run mem-triton write again')
            tokens |= {info.ref: info.tokens for info in named}
            self._remember_trained(named)
        pages = self._most_pages(tuple(map(Attachment, tokens)), tokens) + self._head_pages
        if pages > self.layout.max_pages:
            raise RequestError(
                "mem_ids", f"need {pages} memory pages, a request may use {self.layout.max_pages}; name fewer entries"
            )
        return tokens

    @property
    def _head_pages(self) -> int:
        return self.residency.pages_for(self.head.tokens)

    def _most_pages(self, plan: Sequence[Attachment], tokens: Mapping[str, int]) -> int:
        """Pages that one step of a request with this plan may see."""
        return most_pages(plan, lambda ref: self.residency.pages_for(tokens[ref]), self.longest_step)

    def find(self, reading: Reading, prompt_ids: Sequence[int]) -> tuple[Attachment, ...]:
        """What a request retrieves: each chunk of its prompt is a query (Memory³, arXiv 2407.01178, section 3),
        or what it asks, for references that are read like text. Changes nothing."""
        if not reading.top_k:
            return ()
        every = self.section.retrieval.every
        if not self.sparse:
            asked = reading.request.query or self.last_user_message.of(prompt_ids, every)
            return self.retriever.whole(
                asked or self.decode(list(prompt_ids[-every:])),
                top_k=reading.top_k,
                tenant=reading.request.tenant,
                attached=reading.plan,
            )
        return self.retriever.plan(
            list(prompt_ids),
            top_k=reading.top_k,
            tenant=reading.request.tenant,
            refreshes=reading.refreshes,
            attached=reading.plan,
            question=reading.request.query or self.last_user_message.of(prompt_ids, every),
        )

    def attach(self, reading: Reading, prompt_ids: Sequence[int], found: Found) -> None:
        """Complete the plan with what was found, as far as it fits; a search that failed leaves it as it is.

        Raises RequestError for a prompt that does not fit or cannot be captured.
        """
        apart = self.head.tokens - self.head.repeated(prompt_ids)[0] if reading.plan or found.plan else 0
        reading.prompt_tokens = len(prompt_ids) + apart  # the head counts once, or twice
        self._check_context(reading, reading.prompt_tokens)
        if reading.capture is not None:
            self.captures.begin(reading.capture, prompt_ids)
        if found.failure is not None:
            reading.retrieval_note = f"off: {found.failure}"
        else:
            self._extend(reading, found.plan, reading.prompt_tokens)
        joined = self.head.join(reading.plan, reading.tokens, prompt_ids)
        reading.plan, reading.tokens = joined.plan, dict(joined.tokens)
        reading.dropped, reading.head_note = joined.dropped, joined.note

    def _extend(self, reading: Reading, found: Sequence[Attachment], context_tokens: int) -> None:
        """Add retrieved references that fit to the plan. context_tokens: of the prompt and the answer so far."""
        tokens = {a.ref: self._tokens_of(reading, a.ref) for a in (*reading.plan, *found)}
        kept = sum(self.residency.pages_for(n) for ref, n in self._default.items() if ref not in tokens)
        plan = fitting(
            (*reading.plan, *found),
            lambda ref: self.residency.pages_for(tokens[ref]),
            window=self.longest_step,
            table_pages=self.layout.max_pages - self._head_pages,
            pool_pages=self.layout.num_pages - kept - self._head_pages,
        )
        read = context.within(plan, tokens, self.max_model_len - context_tokens - 1)
        for left_out, what in (
            (len(reading.plan) + len(found) - len(plan), "the memory pages of a request"),
            (len(plan) - len(read), f"the model's context of {self.max_model_len} tokens"),
        ):
            if left_out:
                metrics.FEWER_REFERENCES.inc()
                reading.retrieval_note = f"{left_out} references did not fit into {what}"
        reading.plan, reading.tokens = read, {a.ref: tokens[a.ref] for a in read}

    def _check_context(self, reading: Reading, prompt_tokens: int) -> None:
        """Raises RequestError if what the request names, its prompt and a token of the answer exceed the context."""
        memory = context.named_tokens(reading.plan, reading.tokens)
        if why := context.beyond(memory, prompt_tokens, self.max_model_len):
            raise RequestError("mem_ids", why)

    def _tokens_of(self, reading: Reading, ref: str) -> int:
        if ref in reading.tokens:
            return reading.tokens[ref]
        return self.bank.resolve(ref, tenant=reader_of(ref, reading.request.tenant)).tokens

    def cut(self, reading: Reading, prompt_tokens: int, max_tokens: int | None) -> tuple[int, int]:
        """(tokens of each engine request that serves the answer, tokens of the whole answer); without refreshes it is
        one piece. max_tokens: what the request allows, None if as many as fit: the context holds named entries, too."""
        memory = context.named_tokens(reading.plan, reading.tokens)
        limit, reading.context_note = context.answer_limit(max_tokens, memory, prompt_tokens, self.max_model_len)
        return (self.section.retrieval.every if reading.refreshes else limit), limit

    def find_next(self, reading: Reading, prompt_tokens: int, generated: Sequence[int]) -> tuple[Attachment, ...]:
        """The references for the tokens just generated, seen by the next ``every`` ones. Changes nothing."""
        plan = self.retriever.extend(
            reading.plan, prompt_tokens, list(generated), top_k=reading.top_k, tenant=reading.request.tenant
        )
        return plan[len(reading.plan) :]

    def refresh(self, reading: Reading, generated: int, found: Found) -> None:
        """Add what ``find_next`` found for the ``generated`` tokens so far to the plan, and pin its pages.

        The answer goes on in any case: without new references where the search failed or the pool has no room now.
        A request that held pages and waited for more could wait for another one that does the same.
        """
        before, tokens, claims = reading.plan, reading.tokens, len(reading.tickets)
        reason = found.failure
        if reason is None:
            try:
                self._extend(reading, found.plan, reading.prompt_tokens + generated)
                self.claim(reading)
            except (BankError, RequestError, OSError) as error:
                reason = str(error)
        if any(ticket.state == "waiting" for ticket in reading.tickets[claims:]):
            reason = "the pool has no free pages"
        if reason is None:
            return
        for ticket in reading.tickets[claims:]:
            self.residency.release(ticket.owner)
        del reading.tickets[claims:]
        reading.plan, reading.tokens, reading.note = before, tokens, f"after {generated} tokens: {reason}"
        metrics.REFRESH_FAILURES.inc()
        self._logger.warning("references are not refreshed: %s", reason)

    def claim(self, reading: Reading) -> None:
        """Pin the pages of what the plan names and no earlier claim does; nothing for a request that is over.

        Raises RequestError if it never fits.
        """
        held = {ref for ticket in reading.tickets for ref in ticket.tokens}
        tokens = {a.ref: self._tokens_of(reading, a.ref) for a in reading.plan if a.ref not in held}
        if not tokens or reading.closed:
            return
        try:
            reading.tickets.append(self.residency.request(f"{reading.id}:{len(reading.tickets)}", tokens))
        except PoolCapacityError as error:
            raise RequestError("mem_ids" if reading.request.ids else "mem_top_k", str(error)) from None

    def close(self, reading: Reading) -> None:
        """End the request: its pages may be evicted."""
        reading.closed = True
        self.release(reading)
        if reading.capture is not None:
            self.captures.release(reading.capture)

    def release(self, reading: Reading) -> None:
        """Unpin the request's pages: they may be evicted."""
        if failed := {ticket.failed for ticket in reading.tickets if ticket.failed is not None}:
            self._lose_defaults(failed)
        for ticket in reading.tickets:
            self.residency.release(ticket.owner)
        reading.tickets.clear()

    def payload(self, reading: Reading) -> SystemPayload | None:
        """What the workers and the prefix keys need of a request whose pages are filled."""
        if not reading.plan:
            return None
        pages = {ref: PageRun(tuple(run), t.tokens[ref]) for t in reading.tickets for ref, run in t.pages.items()}
        return SystemPayload(self.bank_key, None, tuple(Segment(a.ref, a.first, a.end) for a in reading.plan), pages)
