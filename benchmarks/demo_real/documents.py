"""Ways to ask about documents: without them, as text in the prompt, and as entries of a bank."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.client import Answer, Client, user
from benchmarks.quality.data import Document, Question
from benchmarks.quality.scores import says
from mem_triton.store.bank import Bank


@dataclass
class Way:
    """One way. make: a question's message and its memory fields. alone: answered one by one, for the time to the
    first token; together: with all questions at once. Neither was asked before, unless ``again``.
    """

    name: str
    client: Client
    make: Callable[[Question], tuple[str, dict[str, Any] | None]]
    again: bool = False
    answers: list[Answer] = field(default_factory=list)
    alone: list[Answer] = field(default_factory=list)

    async def ask(self, questions: list[Question], tokens: int) -> None:
        """Ask the first question about each of eight documents alone, then all at once."""
        first = {question.document: question for question in reversed(questions)}
        for question in list(first.values())[::-1][:8]:
            self.alone.append(await self._one(question, 1))
        self.answers = list(await asyncio.gather(*(self._one(question, tokens) for question in questions)))

    async def _one(self, question: Question, tokens: int) -> Answer:
        text, memory = self.make(question)
        return await self.client.chat(user(text), tokens, memory)

    def right(self, questions: list[Question]) -> int:
        """How many answers say it."""
        return sum(says(a.text, q.answers) for a, q in zip(self.answers, questions, strict=True))

    @property
    def prompt_tokens(self) -> float:
        """Median of what the engine reads."""
        return statistics.median(answer.prompt for answer in self.answers)

    @property
    def ttft(self) -> float:
        """Median seconds to the first token of a request that has the server for itself."""
        return statistics.median(answer.ttft for answer in self.alone)


def ways(stock: Client, memory: Client, texts: dict[str, Document], questions: list[Question], bank: Path) -> list[Way]:
    """All ways, in the order in which they are to be asked: what makes caches warm comes before what finds them so."""
    with Bank.open(bank) as opened:
        found = {q: opened.search(q.text, top_k=1)[0].ref.partition(":")[0] for q in questions}

    def in_prompt(id: str, question: Question) -> tuple[str, None]:
        return f"{texts[id].text}\n{question.text}", None

    return [
        Way("stock, nothing", stock, lambda q: (q.text, None)),
        Way("stock, its document in the prompt", stock, lambda q: in_prompt(q.document, q)),
        Way("   again: prefix cache warm", stock, lambda q: in_prompt(q.document, q), again=True),
        Way("stock, the document that a search finds", stock, lambda q: in_prompt(found[q], q)),
        Way("bank, its document by name", memory, lambda q: (q.text, {"mem_ids": [q.document]})),
        Way("   again: pages on the device", memory, lambda q: (q.text, {"mem_ids": [q.document]}), again=True),
        Way("bank, the document that it finds itself", memory, lambda q: (q.text, {"mem_top_k": 1})),
    ]
