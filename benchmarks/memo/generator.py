"""A scripted generator: answers the prompts of a build by rules, from the sentences that it finds in them, as JSON."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from benchmarks.memo.world import RELATIONS, SURFACING, World, ask, stated

Messages = list[dict[str, Any]]
_SENTENCE = re.compile(r"[^.!?]+[.!?]")
STRANGERS = World(seed=99, people=400).strangers
"""Names to invent; those that the text shows are left out."""


def reply(messages: Messages, schema: str) -> str:
    """The reply to a step's prompt. schema: the step's name."""
    parts = dict(
        part.split("\n", 1) for part in re.split(r"\n*^# ", messages[1]["content"], flags=re.MULTILINE) if "\n" in part
    )
    return json.dumps(_STEPS[schema](parts))


def _facts(text: str) -> list[tuple[str, str, str]]:
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)  # headings
    return [fact for found in _SENTENCE.findall(text) if (fact := stated(found.strip())) is not None]


def _text(parts: dict[str, str]) -> str:
    return json.loads(parts["document"])


def _pairs(found: list[tuple[str, str]]) -> dict[str, Any]:
    return {"pairs": [{"question": question, "answer": answer} for question, answer in found]}


def _sentence(name: str, relation: str, value: str) -> str:
    return RELATIONS[relation][0].format(n=name, v=value)


def _direct(parts: dict[str, str]) -> dict[str, Any]:
    facts = _facts(_text(parts))
    return _pairs([(ask(r, n, wording), _sentence(n, r, v)) for n, r, v in facts for wording in (0, 0, 1)])


def _indirect(parts: dict[str, str]) -> dict[str, Any]:
    """Two facts of one entity; one question says "they", which the check has to put right, and one only "it"."""
    facts = _facts(_text(parts))
    found = [
        (f"What is known about {fact[0]} besides that {_sentence(*other)}", _sentence(*fact))
        for fact, other in pairwise(facts)
    ]
    if facts:
        n, r, v = facts[0]
        found += [(ask(r, "they"), _sentence(n, r, v)), ("Is it so?", f"Yes, {_sentence(n, r, v)}")]
    return _pairs(found)


def _items(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _consolidate(parts: dict[str, str]) -> dict[str, Any]:
    facts = list(dict.fromkeys(fact for item in _items(parts["pairs"]) for fact in _facts(item["answer"])))
    found = []
    for (n, a, v), (m, b, w) in pairwise(facts):
        if n == m:
            found.append((f"What are {n}'s {a} and {b}?", f"{_sentence(n, a, v)} {_sentence(n, b, w)}"))
    return _pairs(found)


def _contain(parts: dict[str, str]) -> dict[str, Any]:
    name = next((fact[0] for fact in _facts(_text(parts))), "")
    verdicts = []
    for item in _items(parts["pairs"]):
        question = item["question"].replace(" they", f" {name}") if name else item["question"]
        verdicts.append({"number": item["number"], "question": "" if question == "Is it so?" else question})
    return {"verdicts": verdicts}


def _surface(parts: dict[str, str]) -> dict[str, Any]:
    known: dict[str, dict[str, str]] = {}
    for item in _items(parts["pairs"]):
        for name, relation, value in _facts(item["answer"]):
            known.setdefault(name, {})[relation] = value
    found = []
    for name, facts in known.items():
        for wording, said in SURFACING.values():
            needed = set(re.findall(r"\{(\w+)\}", wording))
            if needed <= facts.keys():
                found.append((wording.format(**facts), said.format(n=name, **facts)))
    return _pairs(found)


def _cross(parts: dict[str, str]) -> dict[str, Any]:
    mine = list(dict.fromkeys(fact for item in _items(parts["pairs"]) for fact in _facts(item["answer"])))
    others = list(dict.fromkeys(fact for item in _items(parts["others"]) for fact in _facts(item["answer"])))
    found = []
    for n, r, v in mine:
        for m, s, w in others:
            if (r, v) == (s, w):
                found.append((f"What do {n} and {m} have in common?", f"{_sentence(n, r, v)} {_sentence(m, s, w)}"))
            elif v == m and (r, s) == ("employer", "seat"):
                found.append((f"In which city is the company that {n} works for?", _sentence(m, s, w)))
    return _pairs(found)


def _paraphrase(parts: dict[str, str]) -> dict[str, Any]:
    count, items = int(parts["wordings of each"]), _items(parts["pairs"])
    said = []
    for item in items:
        fact = next(iter(_facts(item["answer"])), None)
        wordings = [ask(fact[1], fact[0], i) for i in (1, 2, 3)] if fact else []
        wordings = [one for one in wordings if one != item["question"]] or [f"Tell me: {item['question']}"]
        said.append({"number": item["number"], "questions": wordings[:count]})
    return {"paraphrases": said}


def _unknown(parts: dict[str, str]) -> dict[str, Any]:
    count, start = int(parts["number"]), sum(map(ord, parts["pairs"])) % 300
    names = [name for name in STRANGERS[start:] if name not in parts["pairs"]][:count]
    return {"unknowns": [{"name": name, "question": ask("pet", name)} for name in names]}


_STEPS = {
    "direct": _direct,
    "indirect": _indirect,
    "consolidate": _consolidate,
    "contain": _contain,
    "surface": _surface,
    "cross": _cross,
    "paraphrase": _paraphrase,
    "unknown": _unknown,
}
