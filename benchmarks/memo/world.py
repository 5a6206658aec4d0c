"""An invented world: people, companies and places, documents in prose about them, and questions with their answers.

Nothing in it is in any model's training data, so what a model answers about it, it has learned here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    "Mara Odin Selka Tavio Brenna Corin Dalia Ervin Fenna Goran Halia Ivo Jorin Kesta Lumi Matteo Nerys Oskar Petra "
    "Runa Soren Talia Ulric Vesna Wendel Xenia Yorick Zelda Anton Bodil Cyra Dunja Elio Freya Hugo Irena Jonas Leif"
)
LAST = _words(
    "Stone Varga Holm Brandt Okoro Lindqvist Marsh Petrov Castell Nakata Duarte Fenwick Grieg Halloran Ibsen Jarvis "
    "Kowal Lemaire Moreau Novak Ostrom Pryce Quist Rasmus Sorel Tanaka Umber Voss Weiler Yates"
)
CITIES = _words("Lisbon Oslo Nairobi Kyoto Lima Quebec Tallinn Bergen Cairo Denver Madras Turin Leeds Bilbao Riga")
HEADS, TAILS = _words("Bor Kel Zan Tor Mir Vel Dax Lum Nor Pra Ril Sta"), _words("vex tron dale mira lith ona quin")
ROLES = _words("geologist translator surgeon architect chemist pilot librarian sculptor economist botanist welder")
INSTRUMENTS = _words("cello trumpet harp accordion flute banjo oboe violin bagpipes piano mandolin tuba")
PETS = _words("parrot ferret tortoise greyhound hedgehog goat rabbit donkey canary hamster")
PRODUCTS = [
    "solar lamps",
    "wool blankets",
    "racing bicycles",
    "diving masks",
    "chess clocks",
    "steam valves",
    "paper kites",
    "glass lenses",
    "ice skates",
]
COLOURS = _words("purple orange teal crimson silver olive turquoise golden navy maroon")
VALUES = {
    "birthplace": CITIES,
    "role": ROLES,
    "instrument": INSTRUMENTS,
    "pet": PETS,
    "seat": CITIES,
    "product": PRODUCTS,
    "colour": COLOURS,
}
"""Relation -> what can be said, where it is no name of the world."""
UNKNOWN = "I don't know."

RELATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "birthplace": (
        "{n} was born in {v}.",
        (
            "Where was {n} born?",
            "In which city was {n} born?",
            "What is the birthplace of {n}?",
            "Tell me the city of {n}'s birth.",
        ),
    ),
    "role": (
        "{n} works as a {v}.",
        (
            "What is {n}'s profession?",
            "What does {n} do for a living?",
            "What is the occupation of {n}?",
            "How does {n} earn money?",
        ),
    ),
    "instrument": (
        "{n} plays the {v}.",
        (
            "Which instrument does {n} play?",
            "What musical instrument does {n} play?",
            "Name the instrument that {n} plays.",
            "On what instrument can one hear {n}?",
        ),
    ),
    "pet": (
        "{n} has a {v}.",
        (
            "What pet does {n} have?",
            "Which animal does {n} keep?",
            "What kind of pet lives with {n}?",
            "Say what sort of animal {n} owns.",
        ),
    ),
    "employer": (
        "{n} works for {v}.",
        (
            "Which company does {n} work for?",
            "Who is {n}'s employer?",
            "At what company is {n} employed?",
            "Name the firm that pays {n}.",
        ),
    ),
    "founder": (
        "{n} was founded by {v}.",
        ("Who founded {n}?", "Who is the founder of {n}?", "By whom was {n} started?", "Name whoever established {n}."),
    ),
    "seat": (
        "{n} has its headquarters in {v}.",
        (
            "In which city is the headquarters of {n}?",
            "Where is {n} based?",
            "What city is {n} located in?",
            "Name the town from which {n} is run.",
        ),
    ),
    "product": (
        "{n} makes {v}.",
        (
            "What does {n} make?",
            "What is the main product of {n}?",
            "Which goods does {n} produce?",
            "For which merchandise is {n} known?",
        ),
    ),
    "colour": (
        "The logo of {n} is {v}.",
        (
            "What colour is the logo of {n}?",
            "Which colour does {n} use in its logo?",
            "What colour is {n}'s emblem?",
            "In what shade is {n}'s logo printed?",
        ),
    ),
}
"""Relation -> (the sentence that says it, the questions for it). The last wording is for evaluation."""
OF_PEOPLE = ("birthplace", "role", "instrument", "pet", "employer")
OF_COMPANIES = ("founder", "seat", "product", "colour")
HOPS: dict[tuple[str, str], str] = {
    ("employer", "seat"): "In which city is the headquarters of the company that {n} works for?",
    ("employer", "product"): "What does the company that employs {n} make?",
    ("employer", "colour"): "What colour is the logo of the company that {n} works for?",
    ("founder", "birthplace"): "Where was the founder of {n} born?",
    ("founder", "instrument"): "Which instrument does the founder of {n} play?",
}
"""Two relations after each other -> the question for what is at their end."""
SURFACING = {
    "person": ("Who works as a {role} and plays the {instrument}?", "{n} is the {role} who plays the {instrument}."),
    "company": ("Which company makes {product} in {seat}?", "{n} is the company in {seat} that makes {product}."),
}


@dataclass(frozen=True)
class Asked:
    """A question. name: whom it is about; value: what a right answer contains, "" where nothing is known."""

    question: str
    answer: str
    name: str
    relation: str
    value: str
    via: str = ""


@dataclass
class World:
    """People and companies with their facts, the same for the same seed. strangers: names that no document holds."""

    seed: int = 0
    people: int = 12
    companies: int = 6
    facts: dict[str, dict[str, str]] = field(default_factory=dict, init=False)
    strangers: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        made = random.Random(self.seed)
        names = [f"{first} {last}" for first in FIRST for last in LAST]
        firms = [head + tail for head in HEADS for tail in TAILS]
        made.shuffle(names)
        made.shuffle(firms)
        people, self.strangers = names[: self.people], names[self.people : 2 * self.people]
        companies = firms[: self.companies]
        values = {**VALUES, "employer": companies, "founder": people}
        for name in people:
            self.facts[name] = {relation: made.choice(values[relation]) for relation in OF_PEOPLE}
        for name in companies:
            self.facts[name] = {relation: made.choice(values[relation]) for relation in OF_COMPANIES}

    def sentence(self, name: str, relation: str) -> str:
        return RELATIONS[relation][0].format(n=name, v=self.facts[name][relation])

    def documents(self) -> dict[str, str]:
        """Id -> prose about one entity, all of its facts in it."""
        return {
            re.sub(r"\W+", "-", name).lower(): f"# {name}\n\n" + " ".join(self.sentence(name, r) for r in facts) + "\n"
            for name, facts in self.facts.items()
        }

    def one_hop(self, wordings: slice = slice(None)) -> Iterator[Asked]:
        """Questions for single facts. wordings: which of each relation's."""
        for name, facts in self.facts.items():
            for relation, value in facts.items():
                for wording in RELATIONS[relation][1][wordings]:
                    yield Asked(wording.format(n=name), self.sentence(name, relation), name, relation, value)

    def two_hop(self) -> Iterator[Asked]:
        """Questions whose answer needs a fact about what another fact names."""
        for (first, second), wording in HOPS.items():
            for name, facts in self.facts.items():
                if first in facts:
                    via = facts[first]
                    said = self.sentence(via, second)
                    yield Asked(wording.format(n=name), said, name, second, self.facts[via][second], via)

    def unknown(self) -> Iterator[Asked]:
        """Questions about names that no document holds."""
        for name in self.strangers:
            for relation in OF_PEOPLE:
                yield Asked(RELATIONS[relation][1][0].format(n=name), UNKNOWN, name, relation, "")

    def surfacing(self) -> Iterator[Asked]:
        """Questions whose answer is an entity, where one alone fits."""
        for kind, relations in (("person", ("role", "instrument")), ("company", ("product", "seat"))):
            wording, said = SURFACING[kind]
            fits: dict[tuple[str, ...], list[str]] = {}
            for name, facts in self.facts.items():
                if all(relation in facts for relation in relations):
                    fits.setdefault(tuple(facts[r] for r in relations), []).append(name)
            for values, names in fits.items():
                if len(names) == 1:
                    told = dict(zip(relations, values, strict=True))
                    yield Asked(
                        wording.format(**told), said.format(n=names[0], **told), names[0], "surfacing", names[0]
                    )

    def recall(self, question: str) -> str:
        """What a memory model that has learned everything says: one sentence, or that it does not know."""
        return self.learned.get(question.strip(), UNKNOWN)

    @cached_property
    def learned(self) -> dict[str, str]:
        """Question -> answer, of all facts and all surfacing."""
        return {asked.question: asked.answer for asked in (*self.one_hop(), *self.surfacing())}


_SENTENCES = {
    relation: re.compile(re.escape(said).replace(r"\{n\}", "(?P<n>.+?)").replace(r"\{v\}", "(?P<v>.+)"))
    for relation, (said, _) in RELATIONS.items()
}
_QUESTIONS = {
    relations: re.compile(re.escape(wording).replace(r"\{n\}", "(?P<n>.+?)")) for relations, wording in HOPS.items()
}


def stated(sentence: str) -> tuple[str, str, str] | None:
    """(name, relation, value) of a sentence that states a fact, None for another one."""
    for relation, pattern in _SENTENCES.items():
        if found := pattern.fullmatch(sentence.strip()):
            return found["n"], relation, found["v"]
    return None


def hops(question: str) -> tuple[str, str, str] | None:
    """(name, first relation, second relation) of a two-hop question, None for another one."""
    for (first, second), pattern in _QUESTIONS.items():
        if found := pattern.fullmatch(question.strip()):
            return found["n"], first, second
    return None


def ask(relation: str, name: str, wording: int = 0) -> str:
    """A question for one fact."""
    return RELATIONS[relation][1][wording].format(n=name)
