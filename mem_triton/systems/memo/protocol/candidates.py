"""The rules about candidates and about questions that lead nowhere, in code (fact D5).

A candidate about which targeted questions stay unknown loses rank, then its place; the executive is told the result
and cannot undo it. ``strict`` counts ignorance in a row, so that one answer clears it. ``paper`` counts as the authors'
code does: a total that nothing resets, in the pinning stage alone (their eval_msq_trng_structured_multi_step.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from mem_triton.systems.memo.protocol.unknown import normalised

DEMOTE, ELIMINATE, RANKS = 2, 3, 2
"""Unknown replies that cost RANKS ranks, and those that cost the place."""
_MARKS = str.maketrans("", "", ".,!?;:\"'`()“”„«»¿¡？！。，、：；")  # not "+" and "#": C and C++ are two things


def same_question(text: str, rules: str) -> str:
    """What two questions have in common if they are the same one: their words under "strict", their characters under
    "paper"."""
    return text if rules == "paper" else " ".join(normalised(text).translate(_MARKS).split())


@dataclass(frozen=True)
class Ignorance:
    """Unknown replies to questions about a candidate. row: since its last answer."""

    total: int = 0
    row: int = 0


@dataclass(frozen=True)
class Candidates:
    """The entities that may be meant. order: as the executive named them last. lost: ranks that each has lost.

    eliminated: names that are not taken back. counts: ignorance by name. dead: unknown replies by question.
    Names are compared by their normalised form and shown as first written.
    """

    order: tuple[str, ...] = ()
    lost: dict[str, int] = field(default_factory=dict)
    eliminated: tuple[str, ...] = ()
    counts: dict[str, Ignorance] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)

    def named(self, names: Iterable[str], most: int = 20) -> Candidates:
        """The executive names its candidates anew. Those that were eliminated stay so; those it forgets stay behind."""
        gone = {normalised(name) for name in self.eliminated}
        spelled = {normalised(name): name for name in self.order}
        order = {key: spelled.get(key, name) for name in names if (key := normalised(name)) and key not in gone}
        order |= {key: name for key, name in spelled.items() if key not in order}
        return replace(self, order=tuple(order.values())[:most])

    def ranked(self) -> list[str]:
        """The likeliest first: a candidate that lost two ranks stands two places further down."""
        placed = [
            (i + lost + (0.5 if lost else 0.0), name)
            for i, name in enumerate(self.order)
            for lost in (self.lost.get(normalised(name), 0),)
        ]
        return [name for _, name in sorted(placed, key=lambda item: item[0])]

    def find(self, name: str) -> str:
        """A candidate's name as first written, "" if there is none such."""
        return next((one for one in self.order if normalised(one) == normalised(name)), "") if name else ""

    def total(self, name: str) -> int:
        return self.counts.get(normalised(name), Ignorance()).total

    def in_a_row(self, name: str) -> int:
        return self.counts.get(normalised(name), Ignorance()).row

    def heard(self, turn: Sequence[tuple[str, str, str]], confirmed: str, rules: str, pinning: bool) -> Candidates:
        """After a turn. turn: (question, candidate, outcome) of each sub-question; failed ones change nothing.

        confirmed: loses ranks, never its place.
        """
        counts, dead, worse = dict(self.counts), dict(self.dead), []
        for question, candidate, outcome in turn:
            key = same_question(question, rules)
            if outcome == "unknown":
                dead[key] = dead.get(key, 0) + 1
            name = normalised(candidate)
            if not name or (rules == "paper" and not pinning):
                continue
            before = counts.get(name, Ignorance())
            if outcome == "unknown":
                counts[name] = Ignorance(before.total + 1, before.row + 1)
                worse.append(name)
            elif outcome == "answer":
                counts[name] = replace(before, row=0)
        lost, out = dict(self.lost), list(self.eliminated)
        for name in dict.fromkeys(worse):
            count = counts[name].total if rules == "paper" else counts[name].row
            before = self.counts.get(name, Ignorance())
            if name in {normalised(one) for one in out}:
                continue
            if count >= ELIMINATE and name != normalised(confirmed):
                out.append(next((one for one in self.order if normalised(one) == name), name))
            elif count >= DEMOTE > (before.total if rules == "paper" else before.row):
                lost[name] = lost.get(name, 0) + RANKS
        gone = {normalised(name) for name in out}
        order = tuple(name for name in self.order if normalised(name) not in gone)
        return Candidates(order, lost, tuple(out), counts, dead)

    def dead_ends(self, threshold: int) -> list[str]:
        """Questions that stayed unknown so often that they are not asked again, in their compared form."""
        return [question for question, count in self.dead.items() if count >= threshold]
