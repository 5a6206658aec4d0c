"""What the two shipped adapters learn from: ``python -m benchmarks.memo.corpora FOLDER`` writes both corpora.

The memory adapter learns the world's facts, and to say that it does not know other names, which are fresh ones in each
epoch. The executive adapter learns the protocol's turns from traces about names that are not in the world.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.memo.hops import (
    ALL_HOPS,
    HOPS,
    LEADS_TO_A_PERSON,
    OF_A_PERSON,
    sentence,
    sub_question,
    two_hop_wordings,
)
from benchmarks.memo.wordings import WORDINGS
from benchmarks.memo.world import (
    FIRST,
    HEADS,
    LAST,
    OF_COMPANIES,
    OF_PEOPLE,
    TAILS,
    UNKNOWN,
    VALUES,
    World,
)
from mem_triton.systems.memo.protocol.prompts import compact_messages
from mem_triton.systems.memo.protocol.state import Evidence, Stage

WORLD = World(seed=0, people=14, companies=7)
"""98 facts about 21 names."""
EPOCHS, SHOWN, UNKNOWNS = 12, 2, 56
"""Of the memory corpus: epochs, wordings of a fact in each, unknown names' questions for 98 facts in each."""
TRACE_EPOCHS, ROWS = 3, 440
"""Of the executive corpus: epochs and rows of each; no row comes twice."""
Row = dict[str, Any]


def row(prompt: str | list[dict[str, str]], answer: str, **more: Any) -> Row:
    """A row as `memo build` writes it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"prompt": messages, "completion": [{"role": "assistant", "content": answer}], **more}


def strangers(world: World) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names that are not in the world: (people, companies) for training, (people, companies) for evaluation."""
    made = random.Random(world.seed + 1)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    firms = [head + tail for head in HEADS for tail in TAILS]
    kept_firms = made.sample([name for name in firms if name not in world.facts], 7)
    used = {*world.facts, *world.strangers, *kept_firms}
    people, firms = ([name for name in names if name not in used] for names in (people, firms))
    made.shuffle(people)
    made.shuffle(firms)
    return people, firms, world.strangers, kept_firms


def relations_of(name: str) -> tuple[str, ...]:
    """Those of a person, who has two names, or of a company."""
    return OF_PEOPLE if " " in name else OF_COMPANIES


def memory_rows(world: World = WORLD, epochs: int = EPOCHS, taught: Collection[str] | None = None) -> Iterator[Row]:
    """Each epoch: every fact in two of its wordings, every entity by its properties, and questions about strangers.

    Half of the strangers share a first or last name with somebody of the world. taught: the names whose facts are told,
    None for all; nobody else of the world is asked about.
    """
    told = {name: facts for name, facts in world.facts.items() if taught is None or name in taught}
    unknowns = UNKNOWNS * sum(map(len, told.values())) // 98
    people, firms, _, _ = strangers(world)
    known = {part for name in told for part in name.split()}
    alike = [name for name in people if known & set(name.split())]
    made = random.Random(world.seed + 2)
    turn = 0
    for epoch in range(epochs):
        for number, (name, facts) in enumerate(told.items()):
            for offset, relation in enumerate(facts):
                shown = WORDINGS[relation][0]
                for i in range(SHOWN):
                    wording = shown[(epoch * SHOWN + i + number + offset) % len(shown)]
                    yield row(wording.format(n=name), world.sentence(name, relation), epoch=epoch)
        for asked in world.surfacing():
            if asked.name in told:
                yield row(asked.question, asked.answer, epoch=epoch)
        for i in range(unknowns):
            pool = (alike, people, firms, alike, firms)[i % 5]
            name, turn = pool[(turn * 7 + i) % len(pool)], turn + 1
            relation = made.choice(relations_of(name))
            yield row(made.choice(WORDINGS[relation][0]).format(n=name), UNKNOWN, epoch=epoch)


def kept_rows(world: World = WORLD) -> Iterator[Row]:
    """Every fact in a wording that training never shows, and questions about strangers that it never names."""
    for number, (name, facts) in enumerate(world.facts.items()):
        for relation in facts:
            kept = WORDINGS[relation][1]
            yield row(kept[number % len(kept)].format(n=name), world.sentence(name, relation))
    _, _, people, firms = strangers(world)
    for number, name in enumerate((*people[::2], *firms[::2])):
        relation = relations_of(name)[number % 4]
        yield row(WORDINGS[relation][0][0].format(n=name), UNKNOWN)


def decided(decision: str, text: str) -> str:
    """A reply of the executive in the compact schema."""
    return json.dumps({"decision": decision, "text": text})


def turn_prompt(question: str, *replies: str) -> list[dict[str, str]]:
    """The messages of an executive's turn, as the protocol makes them."""
    evidence = [
        Evidence(i, Stage.SEEKING, i, "", "", "unknown" if said == UNKNOWN else "answer", said, (i,))
        for i, said in enumerate(replies, 1)
    ]
    made = compact_messages(question, evidence, 16000, last=False, instructed=False)
    return [{"role": message.role, "content": message.content} for message in made]


class Traces:
    """Turns of the protocol about names that are not in the world, with wordings shown or kept."""

    def __init__(self, seed: int, kept: bool, world: World = WORLD) -> None:
        self.random, self.kept = random.Random(seed), kept
        self.people, self.firms, _, _ = strangers(world)

    def rows(self) -> Iterator[Row]:
        """Without end."""
        while True:
            yield from self.one_hop() if self.random.random() < 0.25 else self.two_hops()

    def one_hop(self) -> Iterator[Row]:
        """What is asked is asked in the wording that the memory model knows best; the reply's value is the answer."""
        relation = self.random.choice(sorted(WORDINGS))
        name = self._name(relation in OF_PEOPLE)
        question = self.random.choice(WORDINGS[relation][self.kept]).format(n=name)
        yield row(turn_prompt(question), decided("ask", sub_question(relation, name)))
        if self._shows(0.6):
            yield self._answer(question, relation, name, self._value(relation))

    def two_hops(self) -> Iterator[Row]:
        """What the first hop leads to, then what is asked about it."""
        first, second = self._pair()
        name, via = self._name(first in OF_A_PERSON), self._value(first)
        question = self.random.choice(list(two_hop_wordings(first, second, self.kept))).format(n=name)
        yield row(turn_prompt(question), decided("ask", sub_question(first, name)))
        if self.random.random() < 0.1:
            yield row(turn_prompt(question, UNKNOWN), decided("answer", UNKNOWN))
            return
        found = sentence(first, name, via)
        yield row(turn_prompt(question, found), decided("ask", sub_question(second, via)))
        if self._shows(0.4):
            yield self._answer(question, second, via, self._value(second), found)

    def _shows(self, share: float) -> bool:
        """Whether an answer is a row: mostly it is copied, which takes fewer rows to learn than what to ask."""
        return self.kept or self.random.random() < share

    def _pair(self) -> tuple[str, str]:
        """Two relations; in training, a third are of those that evaluation does not ask about."""
        if self.kept or self.random.random() < 0.67:
            return self.random.choice(HOPS)
        return self.random.choice([pair for pair in ALL_HOPS if pair not in HOPS])

    def _answer(self, question: str, relation: str, name: str, value: str, *before: str) -> Row:
        if self.random.random() < 0.1:
            return row(turn_prompt(question, *before, UNKNOWN), decided("answer", UNKNOWN))
        return row(turn_prompt(question, *before, sentence(relation, name, value)), decided("answer", value))

    def _name(self, person: bool) -> str:
        return self.random.choice(self.people if person else self.firms)

    def _value(self, relation: str) -> str:
        return self.random.choice(VALUES[relation]) if relation in VALUES else self._name(relation in LEADS_TO_A_PERSON)


def executive_rows() -> Iterator[Row]:
    """The traces that the executive adapter learns from."""
    made = Traces(seed=7, kept=False).rows()
    for epoch in range(TRACE_EPOCHS):
        for _ in range(ROWS):
            yield {**next(made), "epoch": epoch}


def kept_traces() -> Iterator[Row]:
    """Traces in wordings that training never shows."""
    made = Traces(seed=8, kept=True).rows()
    for _ in range(48):
        yield next(made)


CORPORA = {"memory": (memory_rows, kept_rows), "executive": (executive_rows, kept_traces)}


def write(folder: Path) -> None:
    """Write ``memory`` and ``executive`` with a ``train.jsonl`` and an ``eval.jsonl`` each."""
    for name, parts in CORPORA.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, rows in zip(("train.jsonl", "eval.jsonl"), parts, strict=True):
            (folder / name / file).write_text(lines(rows()), encoding="utf-8")


def lines(rows: Iterable[Row]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
