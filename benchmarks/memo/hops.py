"""Questions of two hops, put together from a phrase for the entity in the middle and a question about it.

A few of each make many; evaluation takes phrases and questions that no training row holds. The executive learns from
more relations than the world has, so that it reads a phrase instead of knowing that one kind of name has one.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.memo.wordings import WORDINGS
from benchmarks.memo.world import OF_COMPANIES, OF_PEOPLE, RELATIONS

MIDDLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "employer": (
        (
            "the company that {n} works for",
            "the company that employs {n}",
            "{n}'s employer",
            "the employer of {n}",
            "the firm that {n} works at",
            "the business where {n} works",
            "the company where {n} is employed",
            "the firm {n} works for",
            "the company {n} works for",
            "the business that employs {n}",
            "the company that has {n} among its employees",
            "the firm where {n} has a job",
            "the organisation {n} works for",
            "the company {n} is employed by",
            "the firm by which {n} is employed",
            "{n}'s company",
            "{n}'s firm",
            "the company which gave {n} a job",
            "the enterprise that {n} belongs to",
            "the firm {n} goes to every day",
        ),
        ("the firm that pays {n}", "{n}'s place of work"),
    ),
    "founder": (
        (
            "the founder of {n}",
            "the person who founded {n}",
            "{n}'s founder",
            "the one who started {n}",
            "the person who set up {n}",
            "whoever founded {n}",
            "the man or woman who founded {n}",
            "the founder of the company {n}",
            "the person behind {n}",
            "the person who launched {n}",
            "the one who set {n} up",
            "the person who brought {n} into being",
            "whoever started {n}",
            "the man or woman behind {n}",
            "the person by whom {n} was founded",
            "the one to whom {n} owes its existence",
            "the individual who founded {n}",
            "the entrepreneur who started {n}",
            "the person whose idea {n} was",
            "the one who built up {n}",
        ),
        ("the person who created {n}", "whoever established {n}"),
    ),
}
"""First relation -> phrases for what it leads to, shown and kept."""

ALSO: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "teacher": (
        "{n} was taught by {v}.",
        "Who taught {n}?",
        (
            "the teacher of {n}",
            "{n}'s teacher",
            "the person who taught {n}",
            "whoever taught {n}",
            "the one {n} learned from",
            "{n}'s mentor",
            "the person by whom {n} was trained",
            "the one who trained {n}",
        ),
    ),
    "spouse": (
        "{n} is married to {v}.",
        "Who is {n} married to?",
        (
            "the spouse of {n}",
            "{n}'s spouse",
            "the person {n} is married to",
            "the husband or wife of {n}",
            "whoever {n} married",
            "{n}'s better half",
            "the person who married {n}",
            "the one {n} has wed",
        ),
    ),
    "supplier": (
        "{n} buys its parts from {v}.",
        "Which company does {n} buy its parts from?",
        (
            "the supplier of {n}",
            "{n}'s supplier",
            "the company that supplies {n}",
            "the firm from which {n} buys its parts",
            "the company that delivers parts to {n}",
            "the business {n} gets its parts from",
            "whoever supplies {n}",
            "the firm whose parts {n} uses",
        ),
    ),
    "owner": (
        "{n} belongs to {v}.",
        "Who owns {n}?",
        (
            "the owner of {n}",
            "{n}'s owner",
            "the person who owns {n}",
            "whoever owns {n}",
            "the one to whom {n} belongs",
            "the proprietor of {n}",
            "the person that {n} is the property of",
            "the holder of {n}'s stock",
        ),
    ),
}
"""Relations in traces alone -> (the sentence that says it, the question for it, phrases for what it leads to)."""

HOPS = (
    ("employer", "seat"),
    ("employer", "product"),
    ("employer", "colour"),
    ("employer", "founder"),
    ("founder", "birthplace"),
    ("founder", "instrument"),
    ("founder", "role"),
    ("founder", "pet"),
)
"""Two relations after each other that are asked about in evaluation."""
OF_A_PERSON, LEADS_TO_A_PERSON = ("employer", "teacher", "spouse"), ("founder", "owner", "teacher", "spouse")
"""First relations by what they belong to and by what they lead to; the others are a company's."""
ALL_HOPS = tuple(
    (first, second)
    for first in (*MIDDLE, *ALSO)
    for second in (OF_PEOPLE if first in LEADS_TO_A_PERSON else OF_COMPANIES)
)
"""Two relations after each other that traces show."""
ASKED_OF_MEMORY = 0
"""The wording that the executive learns to ask the memory model in."""


def two_hop_wordings(first: str, second: str, kept: bool) -> Iterator[str]:
    """Questions of two hops with a name to fill in. kept: both the phrase and the question are those of evaluation."""
    for phrase in ALSO[first][2] if first in ALSO else MIDDLE[first][kept]:
        for wording in WORDINGS[second][kept]:
            text = wording.replace("{n}", phrase)
            yield text[0].upper() + text[1:]


def sub_question(relation: str, name: str) -> str:
    """What the executive asks the memory model."""
    asked = ALSO[relation][1] if relation in ALSO else WORDINGS[relation][0][ASKED_OF_MEMORY]
    return asked.format(n=name)


def sentence(relation: str, name: str, value: str) -> str:
    """What the memory model replies."""
    said = ALSO[relation][0] if relation in ALSO else RELATIONS[relation][0]
    return said.format(n=name, v=value)
