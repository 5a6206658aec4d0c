"""Finds the references that a text reads: each chunk of the prompt, and later of the answer, asks for its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mem_triton.store.bank import Bank, Hit
from mem_triton.store.pool.plan import FOREVER, Attachment

MOST = 1024
"""Entries looked at for a chunk whose nearest ones are copies of each other."""


class Retriever:
    """The reading schedule of Memory³ (arXiv 2407.01178, section 3.2), as plans.

    decode: token ids to text. top_k: references a chunk; every: tokens of a chunk; min_score: no hits below it.
    fill: encodes cold entries when they are first retrieved (``Writer.fill``); None leaves cold entries out.
    Keeps no state: what comes out follows from the arguments and the bank.

    Example::

        retriever = Retriever(bank, decode=tokenizer.decode)
        plan = retriever.plan(prompt_ids)                                 # before the prompt is read
        plan = retriever.extend(plan, len(prompt_ids), generated_ids)     # after each 64 generated tokens
    """

    def __init__(
        self,
        bank: Bank,
        *,
        decode: Callable[[list[int]], str],
        top_k: int = 5,
        every: int = 64,
        min_score: float | None = None,
        fill: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        for name, value in (("top_k", top_k), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.bank, self.decode, self.top_k, self.every = bank, decode, top_k, every
        self.min_score, self.fill = min_score, fill

    def plan(
        self,
        prompt_ids: Sequence[int],
        *,
        top_k: int | None = None,
        tenant: str = "",
        refreshes: bool = False,
        attached: Sequence[Attachment] = (),
        question: str | None = None,
    ) -> tuple[Attachment, ...]:
        """The prompt's references. Chunk c's are seen by chunk c alone; the last one's also by what is generated.

        That is by the first ``every`` generated tokens if the references are refreshed then, else to the end. A last
        chunk that is not full asks with the prompt's last ``every`` tokens, so that its query is not a word or two.
        attached: what the request reads anyway; nothing that it sees is retrieved a second time. question: what the
        last chunk asks with instead, because its tokens are not all the user's: a system prompt, a template's markers.
        """
        plan: list[Attachment] = []
        length = len(prompt_ids)
        for first in range(0, length, self.every):
            end = min(first + self.every, length)
            seen_until = end
            if end == length:
                seen_until = length + self.every if refreshes else FOREVER
            query = self.decode(list(prompt_ids[max(0, end - self.every) : end]))
            if end == length and question is not None:
                query = question
            plan += self._attachments(query, first, seen_until, top_k, tenant, attached)
        return tuple(plan)

    def whole(
        self, question: str, *, top_k: int | None = None, tenant: str = "", attached: Sequence[Attachment] = ()
    ) -> tuple[Attachment, ...]:
        """References for a request as a whole, which all its tokens see: those that are read like text are no chunk's.

        question: what to search by. attached: what the request reads anyway.
        """
        return tuple(self._attachments(question, 0, FOREVER, top_k, tenant, attached))

    def extend(
        self,
        plan: Sequence[Attachment],
        prompt_tokens: int,
        generated: Sequence[int],
        *,
        top_k: int | None = None,
        tenant: str = "",
    ) -> tuple[Attachment, ...]:
        """The plan with references for the last full chunk of ``generated``, all tokens of the answer so far.

        They are seen by the ``every`` tokens that follow that chunk. Between the boundaries, and when the plan has them
        already, it comes back as it is.
        """
        chunks = len(generated) // self.every
        first = prompt_tokens + chunks * self.every
        if chunks == 0 or any(a.first == first and a.score is not None for a in plan):
            return tuple(plan)
        query = self.decode(list(generated[(chunks - 1) * self.every : chunks * self.every]))
        return (*plan, *self._attachments(query, first, first + self.every, top_k, tenant, plan))

    def _attachments(
        self, query: str, first: int, end: int, top_k: int | None, tenant: str, attached: Sequence[Attachment]
    ) -> list[Attachment]:
        seen = {a.ref for a in attached if a.first < end and first < a.end}  # twice in a softmax is twice the weight
        hits = self._search(query, self.top_k if top_k is None else top_k, tenant)
        return [Attachment(hit.ref, first, end, float(hit.score)) for hit in hits if hit.ref not in seen]

    def _search(self, text: str, top_k: int, tenant: str) -> list[Hit]:
        hits = self._distinct(text, top_k, tenant) if top_k else []
        if self.min_score is not None:
            hits = [hit for hit in hits if hit.score >= self.min_score]
        if self.fill is not None and hits:
            cold = [hit.ref for hit in hits if not self.bank.resolve(hit.ref, tenant=tenant).has_block]
            if cold:
                self.fill(cold)
                hits = [hit for hit in hits if self.bank.resolve(hit.ref, tenant=tenant).has_block]
        return hits

    def _distinct(self, text: str, top_k: int, tenant: str) -> list[Hit]:
        """The nearest texts, each once: files that share a paragraph have an entry of it each."""
        wanted = top_k
        while True:
            hits = self.bank.search(text, wanted, tenant=tenant, only_filled=self.fill is None)
            chosen = self._each_once(hits, tenant)
            if len(chosen) >= top_k or len(hits) < wanted or wanted >= MOST:
                return chosen[:top_k]
            wanted = min(4 * wanted, MOST)

    def _each_once(self, hits: Sequence[Hit], tenant: str) -> list[Hit]:
        chosen, texts = [], set()
        for i, hit in enumerate(hits):
            beside = (*hits[max(i - 1, 0) : i], *hits[i + 1 : i + 2])
            if any(abs(other.score - hit.score) < 1e-6 for other in beside):  # the same text has the same score
                text = self.bank.resolve(hit.ref, tenant=tenant).text
                if text in texts:
                    continue
                texts.add(text)
            chosen.append(hit)
        return chosen
