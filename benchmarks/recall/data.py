"""Facts about people, told and asked for in chat: the language of the small recall model.

A fact is (name, attribute, value): "Mara Stone's locker is falcon." Names are pairs of 64 first and 64 last names;
every fifth pair is held out from training. Any of the 128 values goes with any of the 8 attributes, so guessing is
worth less than 1 %.

Example::

    told = facts(seed=1, n=4)
    fact_message(told)                  # "Remember this. The locker of Mara Stone is falcon. ..."
    question(told[0])                   # "What is the locker of Mara Stone?"
    is_correct("It is falcon.", told[0])
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    """
    Ada Alan Amir Anna Arlo Asha Ben Bella Carl Clara Dara David Diego Dora Edith Elias Emma Eric Esme Ethan Fatima
    Felix Finn Flora Frida Gina Grace Hanna Hugo Ian Ines Iris Ivan Jack Jane Jonas Julia Karl Kenji Lara Leo Liam
    Lina Luca Maja Mara Marco Maria Mila Mina Nadia Nina Noah Nora Omar Oscar Paula Peter Rosa Ruth Sami Sara Theo
    Vera
    """
)
LAST = _words(
    """
    Adams Archer Baker Barnes Bell Bishop Brooks Brown Butler Carter Chan Chen Clark Cole Cook Cooper Cruz Dale Diaz
    Dixon Duncan Evans Fisher Flint Ford Foster Fox Frost Garcia Gray Green Hale Hall Harris Hayes Hill Holt Hunt
    James Kelly King Knight Lane Lee Lopez Marsh Mason Mills Moore Nash Owens Park Patel Price Reed Rivers Ross
    Scott Shaw Silva Stone Walsh Ward Young
    """
)
ATTRIBUTES = _words("badge desk folder laptop locker project ticket team")
VALUES = _words(
    """
    acorn amber anchor apple arrow aspen bamboo banana barley basil beacon beaver birch bison bronze bucket cactus
    camel candle canoe canyon carrot castle cedar cherry cider clover cobalt cobra comet copper coral cotton crane
    crater cricket crystal dagger daisy delta desert dolphin dragon eagle ember falcon feather fern forest fossil
    galaxy garnet ginger glacier granite hammer harbor hazel heron honey island ivory jade jaguar jasmine jungle
    kayak kettle ladder lagoon lantern laurel lemon lily linen lion lizard lotus magnet mango maple marble meadow
    melon meteor mint mirror mountain nectar needle oasis olive onyx orbit orchid otter oyster panda papaya parrot
    pebble pepper pigeon pine planet plum pony poppy prairie quartz rabbit raven ribbon river rocket saddle saffron
    salmon sapphire shadow silver sparrow spruce squid sunset thistle tiger topaz
    """
)

FACT_FORMS = (
    "{name}'s {attribute} is {value}.",
    "The {attribute} of {name} is {value}.",
    "For {name} the {attribute} is {value}.",
    "Note that {name}'s {attribute} is {value}.",
)
QUESTION_FORMS = (
    "What is {name}'s {attribute}?",
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}?",
)
OPENING, REPLY, ANSWER = "Remember this.", "Noted.", "It is {value}."


@dataclass(frozen=True)
class Fact:
    """One fact: "<name>'s <attribute> is <value>"."""

    name: str
    attribute: str
    value: str


def is_held_out(first: int, last: int) -> bool:
    """Every fifth pair of a first and a last name never occurs in training; both names do, with others."""
    return (first * 64 + last) * 2654435761 % 2**32 % 5 == 0


HELD_OUT = [(a, b) for a in range(64) for b in range(64) if is_held_out(a, b)]
TRAINED = [(a, b) for a in range(64) for b in range(64) if not is_held_out(a, b)]


def draw(rng: random.Random, n: int, pool: list[tuple[int, int]] = HELD_OUT, shared: float = 0.0) -> list[Fact]:
    """n facts with distinct (name, attribute). shared: share of them that repeat a name with another attribute."""
    pairs = rng.sample(pool, n)
    for i in range(1, n):
        other = pairs[rng.randrange(i)]
        if rng.random() < shared and pairs.count(other) < len(ATTRIBUTES):
            pairs[i] = other
        elif rng.random() < shared / 2:  # half a name in common with another person
            first, last = pairs[rng.randrange(i)]
            near = [(first, pairs[i][1]), (pairs[i][0], last)]
            near = [p for p in near if pairs.count(p) < len(ATTRIBUTES)]
            pairs[i] = next((p for p in near if is_held_out(*p) == is_held_out(*pairs[i])), pairs[i])
    taken: set[tuple[tuple[int, int], str]] = set()
    told = []
    for pair in pairs:
        attribute = rng.choice([a for a in ATTRIBUTES if (pair, a) not in taken])
        taken.add((pair, attribute))
        told.append(Fact(f"{FIRST[pair[0]]} {LAST[pair[1]]}", attribute, rng.choice(VALUES)))
    return told


def facts(seed: int, n: int) -> list[Fact]:
    """n facts about held-out names; a third of the names have more than one fact."""
    return draw(random.Random(seed), n, HELD_OUT, shared=1 / 3)


def fact_message(told: list[Fact], seed: int = 0) -> str:
    """The user message that tells the facts."""
    rng = random.Random(seed)
    return " ".join([OPENING, *(rng.choice(FACT_FORMS).format(**vars(fact)) for fact in told)])


def question(fact: Fact, seed: int = 0) -> str:
    """The user message that asks for a fact."""
    return random.Random(seed).choice(QUESTION_FORMS).format(**vars(fact))


def is_correct(answer: str, fact: Fact) -> bool:
    """Whether the answer names the fact's value and no other."""
    return [word for word in re.findall(r"[a-z]+", answer.lower()) if word in VALUES] == [fact.value]
