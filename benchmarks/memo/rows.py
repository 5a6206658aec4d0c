"""Questions about the invented world, the ways to ask them, and what each way is measured by."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.client import Answer, Client, user
from benchmarks.common.statistics import wilson
from benchmarks.memo.corpora import WORLD, relations_of, strangers
from benchmarks.memo.hops import HOPS, two_hop_wordings
from benchmarks.memo.wordings import WORDINGS
from benchmarks.memo.world import UNKNOWN, World
from mem_triton.systems.memo.protocol.unknown import kind_of

KINDS = ("one hop, unseen wording", "two hops", "two hops, unseen wording", "unknown name")


@dataclass(frozen=True)
class Question:
    """A question of a kind. value: what a right answer says; "" where the right answer is not to know."""

    kind: str
    text: str
    value: str

    def is_right(self, answer: str) -> bool:
        if not self.value:
            return kind_of(answer) == "unknown"
        return self.value.lower() in answer.lower()


def questions(world: World = WORLD) -> dict[str, list[Question]]:
    """Every question, by kind, in an order that is shuffled once."""
    made = random.Random(world.seed)
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for name, facts in world.facts.items():
        for relation, value in facts.items():
            found[KINDS[0]] += [Question(KINDS[0], w.format(n=name), value) for w in WORDINGS[relation][1]]
        for first, second in HOPS:
            if first in facts:
                value = world.facts[facts[first]][second]
                for kind, kept in ((KINDS[1], False), (KINDS[2], True)):
                    wording = made.choice(list(two_hop_wordings(first, second, kept)))
                    found[kind].append(Question(kind, wording.format(n=name), value))
    _, _, people, firms = strangers(world)
    for name in (*people, *firms):
        for relation in relations_of(name):
            wording = made.choice(WORDINGS[relation][0])
            found[KINDS[3]].append(Question(KINDS[3], wording.format(n=name), ""))
    for some in found.values():
        made.shuffle(some)
    return found


def chosen(count: int, world: World = WORLD) -> list[Question]:
    """So many questions, as many of each kind; 0 for all."""
    found = questions(world)
    return [one for some in found.values() for one in (some[: count // len(found)] if count else some)]


@dataclass
class Way:
    """One way to ask. model: the served name; make: a question's message."""

    name: str
    model: str
    make: Callable[[str], str] = str
    tokens: int = 16
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    async def ask(self, client: Client, asked: Sequence[Question]) -> None:
        """Ask all questions at once, as many at a time as the client sends, but for the first one: what all prompts
        begin with is in the cache then."""
        begin = time.perf_counter()
        first, *rest = (client.chat(user(self.make(one.text)), self.tokens, model=self.model) for one in asked)
        self.answers = [await first, *await asyncio.gather(*rest)]
        self.seconds = time.perf_counter() - begin

    @property
    def prompt_tokens(self) -> float:
        """Mean of what the engine reads for a question, of all its calls."""
        return sum(answer.prompt for answer in self.answers) / max(1, len(self.answers))

    def figures(self, asked: Sequence[Question]) -> dict[str, Any]:
        """Right answers by kind with 95 % Wilson intervals, answers that say that nothing is known, tokens, seconds."""
        by_kind = {}
        for kind in KINDS:
            pairs = [(one, said.text) for one, said in zip(asked, self.answers, strict=True) if one.kind == kind]
            right = sum(one.is_right(text) for one, text in pairs)
            by_kind[kind] = {
                "questions": len(pairs),
                "right": right,
                "interval": list(wilson(right, len(pairs))) if pairs else None,
                "says_unknown": sum(kind_of(text) == "unknown" for _, text in pairs),
            }
        return {
            "by_kind": by_kind,
            "prompt_tokens": round(self.prompt_tokens, 1),
            "output_tokens": round(sum(a.tokens for a in self.answers) / max(1, len(self.answers)), 1),
            "seconds": round(self.seconds, 1),
            "answers": [
                [one.kind, one.text, one.value or UNKNOWN, said.text]
                for one, said in zip(asked, self.answers, strict=True)
            ],
        }


def ways(world: World = WORLD) -> list[Way]:
    """All ways, in the order in which they are asked."""
    text = "\n\n".join(world.documents().values())
    return [
        Way("the base alone", "M"),
        Way("the memory model alone", "memo"),
        Way("M+memo", "M+memo", tokens=96),
        Way("the corpus as text in the prompt", "M", lambda question: f"{text}\n{question}"),
    ]
