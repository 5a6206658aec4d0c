"""Wordings of questions about the invented world: those that training shows, and those kept for evaluation.

Questions of two hops are put together from a phrase for the entity in the middle and a question about it, so that a
few of each make many; evaluation takes phrases and questions that no training row holds.
"""

from __future__ import annotations

from collections.abc import Iterator

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "birthplace": (
        (
            "Where was {n} born?",
            "In which city was {n} born?",
            "What is the birthplace of {n}?",
            "Which city is {n} originally from?",
            "What is {n}'s city of birth?",
            "Name the town where {n} was born.",
            "{n} was born in which city?",
            "Can you tell me the birthplace of {n}?",
        ),
        ("Tell me the city of {n}'s birth.", "Do you know what town {n} comes from?"),
    ),
    "role": (
        (
            "What is {n}'s profession?",
            "What does {n} do for a living?",
            "What is the occupation of {n}?",
            "What job does {n} have?",
            "What does {n} work as?",
            "Name the profession of {n}.",
            "In what line of work is {n}?",
            "Can you tell me {n}'s occupation?",
        ),
        ("How does {n} earn money?", "Say what {n}'s trade is."),
    ),
    "instrument": (
        (
            "Which instrument does {n} play?",
            "What musical instrument does {n} play?",
            "Name the instrument that {n} plays.",
            "What is {n}'s instrument?",
            "What does {n} play in the orchestra?",
            "{n} plays which instrument?",
            "On which instrument does {n} perform?",
            "Can you tell me what instrument {n} plays?",
        ),
        ("On what instrument can one hear {n}?", "If {n} gave a concert, which instrument would it be on?"),
    ),
    "pet": (
        (
            "What pet does {n} have?",
            "Which animal does {n} keep?",
            "What kind of pet lives with {n}?",
            "What animal is {n}'s pet?",
            "Which pet does {n} own?",
            "Name the pet of {n}.",
            "{n} has which animal at home?",
            "Can you tell me what pet {n} keeps?",
        ),
        ("Say what sort of animal {n} owns.", "Which creature shares a home with {n}?"),
    ),
    "employer": (
        (
            "Which company does {n} work for?",
            "Who is {n}'s employer?",
            "At what company is {n} employed?",
            "Where does {n} work?",
            "What firm does {n} work at?",
            "Name the employer of {n}.",
            "{n} works for which company?",
            "Can you tell me which firm employs {n}?",
        ),
        ("Name the firm that pays {n}.", "On the staff of which business is {n}?"),
    ),
    "founder": (
        (
            "Who founded {n}?",
            "Who is the founder of {n}?",
            "By whom was {n} started?",
            "Who set up the company {n}?",
            "Which person founded the firm {n}?",
            "Name the founder of {n}.",
            "{n} was founded by whom?",
            "Can you tell me who started {n}?",
        ),
        ("Name whoever established {n}.", "Which person created the firm {n}?"),
    ),
    "seat": (
        (
            "In which city is the headquarters of {n}?",
            "Where is {n} based?",
            "What city is {n} located in?",
            "Where does {n} have its head office?",
            "In what town is {n} situated?",
            "Name the city where {n} is based.",
            "{n} has its headquarters in which city?",
            "Can you tell me where the head office of {n} is?",
        ),
        ("Name the town from which {n} is run.", "To visit {n}, which city would I travel to?"),
    ),
    "product": (
        (
            "What does {n} make?",
            "What is the main product of {n}?",
            "Which goods does {n} produce?",
            "What does {n} sell?",
            "What does the company {n} manufacture?",
            "Name the product of {n}.",
            "{n} makes which goods?",
            "Can you tell me what {n} produces?",
        ),
        ("For which merchandise is {n} known?", "Tell me what comes out of the {n} factory."),
    ),
    "colour": (
        (
            "What colour is the logo of {n}?",
            "Which colour does {n} use in its logo?",
            "What colour is {n}'s emblem?",
            "What is the logo colour of {n}?",
            "Which colour is {n}'s logo?",
            "Name the colour of the logo of {n}.",
            "{n} has a logo of which colour?",
            "Can you tell me the colour of {n}'s logo?",
        ),
        ("In what shade is {n}'s logo printed?", "Describe the colour on {n}'s sign."),
    ),
}
"""Relation -> (wordings that training shows, wordings for evaluation alone)."""

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
        ),
        ("the person who created {n}", "whoever established {n}"),
    ),
}
"""First relation -> phrases for what it leads to, shown and kept."""

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
"""Two relations after each other."""
ASKED_OF_MEMORY = 0
"""The wording that the executive learns to ask the memory model in."""


def two_hop_wordings(first: str, second: str, kept: bool) -> Iterator[str]:
    """Questions of two hops with a name to fill in. kept: both the phrase and the question are those of evaluation."""
    for phrase in MIDDLE[first][kept]:
        for wording in WORDINGS[second][kept]:
            text = wording.replace("{n}", phrase)
            yield text[0].upper() + text[1:]


def sub_question(relation: str, name: str) -> str:
    """What the executive asks the memory model."""
    return WORDINGS[relation][0][ASKED_OF_MEMORY].format(n=name)
