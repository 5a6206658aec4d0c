"""References for explicit memory: texts of up to 128 tokens that tell facts among sentences that answer nothing.

Example::

    told, references = library(random.Random(1), references=5, facts=(1, 3))
    references[0]        # "Note that this is the desk. The locker of Mara Stone is falcon. The team of the project ..."
"""

from __future__ import annotations

import random

from benchmarks.recall import data
from benchmarks.recall.chat import END, START

NEUTRAL = (
    "Remember this.",
    "Note that this is the {a}.",
    "The {a} of the {b} is this.",
    "Note that the {a} is the {b}'s.",
    "Tell me the {a} of the {b}.",
    "Remember that this is the {a} of the {b}.",
    "The {a} is {value}.",
    "For the {b} the {a} is {value}.",
)
"""Sentences about nobody, in the words of the facts; some name a value that is nobody's."""

LENGTHS = (64, 128)
"""Shortest and longest reference, in tokens."""


def sentence_tokens(sentence: str) -> int:
    """Tokens of a sentence behind another one: every word is one, and so are "'s" and "."; two words need a blank."""
    return len(sentence.split()) + 1 + sentence.count("'s") + sentence.startswith(("Remember", "Tell"))


def neutral(rng: random.Random) -> str:
    """One sentence about nobody."""
    a, b = rng.sample(data.ATTRIBUTES, 2)
    return rng.choice(NEUTRAL).format(a=a, b=b, value=rng.choice(data.VALUES))


def reference(rng: random.Random, told: list[data.Fact], tokens: int) -> str:
    """A text of at most ``tokens`` tokens that tells the facts, at random places among neutral sentences."""
    sentences = [rng.choice(data.FACT_FORMS).format(**vars(fact)) for fact in told]
    left = tokens - 1 - sum(map(sentence_tokens, sentences))  # the first word may be two tokens without its blank
    while (size := sentence_tokens(filler := neutral(rng))) <= left:
        sentences.append(filler)
        left -= size
    rng.shuffle(sentences)
    return " ".join(sentences)


def library(
    rng: random.Random,
    references: int,
    facts: tuple[int, int],
    pool: list[tuple[int, int]] = data.HELD_OUT,
    shared: float = 1 / 3,
) -> tuple[list[list[data.Fact]], list[str]]:
    """So many references with ``facts[0]`` to ``facts[1]`` facts each: their facts, and their texts.

    No two facts have the same name and attribute. shared: share of facts that repeat another's name, be it in the same
    reference or not.
    """
    counts = [rng.randint(*facts) for _ in range(references)]
    drawn = iter(data.draw(rng, sum(counts), pool, shared))
    told = [[next(drawn) for _ in range(count)] for count in counts]
    return told, [reference(rng, own, rng.randint(*LENGTHS)) for own in told]


def telling_texts(texts: list[str]) -> str:
    """The chat that gives references as text, up to the last processed token: what RAG puts before a question."""
    return f"{START}user\n{' '.join(texts)}{END}\n{START}assistant\n{data.REPLY}"
