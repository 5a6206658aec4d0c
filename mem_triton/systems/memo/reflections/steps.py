"""What each step of a build asks, of which pairs, and what it makes of a reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from mem_triton.systems.memo.protocol.unknown import kind_of, normalised
from mem_triton.systems.memo.reflections.ledger import Ledger, Pair, Unit
from mem_triton.systems.memo.reflections.prompts import (
    VERSION,
    Pairs,
    Paraphrases,
    Unknowns,
    Verdicts,
)
from mem_triton.systems.memo.reflections.settings import BuildSettings

UNKNOWN = "I don't know."
Planned = Iterator[tuple[Sequence[str], dict[str, Any]]]
Changes = dict[tuple[int, int], tuple[str, str]]
FACTS = ("direct", "indirect", "consolidate")


class Unusable(ValueError):
    """A reply that has the right shape and says nothing of use."""


def plan(step: str, ledger: Ledger, settings: BuildSettings) -> Planned:
    """A step's units: (documents, input) each, the same for the same pairs."""
    match step:
        case "direct" | "indirect":
            return _of_chunks(ledger, settings)
        case "consolidate":
            return _of_documents(_as_written(ledger.pairs("direct", "indirect", dropped=True)), settings.least_pairs)
        case "contain":
            return _checks(ledger, settings)
        case "surface":
            return _of_documents(ledger.pairs(*FACTS), 2)
        case "cross":
            return _across(ledger.pairs(*FACTS, "surface"), settings)
        case "paraphrase":
            return _rewordings(ledger.pairs(*FACTS, "surface", "cross"), settings)
        case "unknown":
            return _strangers(ledger.pairs("direct", "indirect"), settings)
    raise AssertionError(step)


def chunks_of(text: str, words: int, overlap: int) -> Iterator[str]:
    """Parts of so many words that overlap; the text as it is where it is short."""
    parts = text.split()
    if len(parts) <= words:
        if parts:
            yield text.strip()
        return
    stride = max(1, words - overlap)
    for start in range(0, max(1, len(parts) - overlap), stride):
        yield " ".join(parts[start : start + words])


def _of_chunks(ledger: Ledger, settings: BuildSettings) -> Planned:
    for document in ledger.documents():
        for chunk in chunks_of(document.text, settings.chunk_words, settings.overlap_words):
            yield (document.id,), {"document": chunk}


def _by_document(pairs: Iterable[Pair]) -> dict[tuple[str, ...], list[Pair]]:
    found: dict[tuple[str, ...], list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.docs, []).append(pair)
    return found


def _as_written(pairs: list[Pair]) -> list[Pair]:
    """Before they were checked: a step that comes before the check asks for the same when a build goes on."""
    return [replace(pair, question=pair.written) for pair in pairs]


def _said(pair: Pair) -> dict[str, str]:
    return {"question": pair.question, "answer": pair.answer}


def _numbered(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [{"number": i, "unit": p.unit, "of": p.number, **_said(p)} for i, p in enumerate(pairs, 1)]


def _groups(pairs: Sequence[Pair], size: int) -> Iterator[list[Pair]]:
    for start in range(0, len(pairs), size):
        yield list(pairs[start : start + size])


def _of_documents(pairs: list[Pair], least: int) -> Planned:
    for docs, found in _by_document(pairs).items():
        if len(found) >= least:
            yield docs, {"pairs": [_said(pair) for pair in found]}


def _checks(ledger: Ledger, settings: BuildSettings) -> Planned:
    texts = {document.id: document.text for document in ledger.documents()}
    for docs, found in _by_document(_as_written(ledger.pairs(*FACTS, dropped=True))).items():
        beginning = next(chunks_of(texts[docs[0]], settings.chunk_words, 0), "")
        for group in _groups(found, settings.group):
            yield docs, {"document": beginning, "pairs": _numbered(group)}


def _across(pairs: list[Pair], settings: BuildSettings) -> Planned:
    documents = _by_document(pair for pair in pairs if len(pair.docs) == 1)
    for docs, found in documents.items():
        others = [pair for other, theirs in documents.items() if other != docs for pair in theirs]
        for group in islice(_groups(others, settings.batch), settings.cross_batches):
            involved = tuple(sorted({*docs, *(doc for pair in group for doc in pair.docs)}))
            mine = [_said(pair) for pair in found]
            yield involved, {"pairs": mine, "others": [_said(pair) | {"document": pair.docs[0]} for pair in group]}


def _rewordings(pairs: list[Pair], settings: BuildSettings) -> Planned:
    for docs, found in _by_document(pairs).items():
        for group in _groups(found, settings.group):
            yield docs, {"wordings of each": settings.paraphrases, "pairs": _numbered(group)}


def _strangers(pairs: list[Pair], settings: BuildSettings) -> Planned:
    for docs, found in _by_document(pairs).items():
        yield docs, {"number": settings.unknowns, "pairs": [_said(pair) for pair in found[: settings.group]]}


def read(unit: Unit, reply: Any, ledger: Ledger, generator: str) -> tuple[list[Pair], Changes]:
    """What a unit's reply gives: new pairs, and what becomes of pairs that it was about. Raises Unusable."""
    if isinstance(reply, Verdicts):
        return [], _verdicts(unit, reply)
    if isinstance(reply, Paraphrases):
        found = _reworded(unit, reply)
    elif isinstance(reply, Unknowns):
        found = _unknowns(unit, reply, ledger)
    else:
        found = _new(unit, reply)
    made = [
        Pair(unit.id, i, unit.step, unit.docs, question, answer, question, held_out, "", VERSION, generator)
        for i, (question, answer, held_out) in enumerate(found)
    ]
    return made, {}


def _new(unit: Unit, reply: Pairs) -> list[tuple[str, str, bool]]:
    """Pairs without those that say nothing, and those whose answer is the document itself."""
    text = unit.input.get("document", "")
    found = [
        (pair.question, pair.answer, False)
        for pair in reply.pairs
        if kind_of(pair.answer) == "answer" and not (len(text) > 400 and len(pair.answer) > len(text) / 2)
    ]
    if reply.pairs and not found:
        raise Unusable("no answer says anything, or the answers are the document")
    return found


def _verdicts(unit: Unit, reply: Verdicts) -> Changes:
    said = {verdict.number: verdict.question for verdict in reply.verdicts}
    changes: Changes = {}
    for item in unit.input["pairs"]:
        if (question := said.get(item["number"])) is None:
            raise Unusable(f"question {item['number']} is not judged")
        dropped = "" if question else "not self-contained"
        changes[item["unit"], item["of"]] = (question or item["question"], dropped)
    return changes


def _reworded(unit: Unit, reply: Paraphrases) -> list[tuple[str, str, bool]]:
    """Wordings of each question; the last one of several is held out."""
    wanted = unit.input["wordings of each"]
    items, found = {item["number"]: item for item in unit.input["pairs"]}, []
    for told in reply.paraphrases:
        if (item := items.pop(told.number, None)) is None:
            continue
        new = {normalised(one): one for one in told.questions if normalised(one) != normalised(item["question"])}
        wordings = list(new.values())[:wanted]
        found += [(one, item["answer"], i > 0 and i == len(wordings) - 1) for i, one in enumerate(wordings)]
    if not found:
        raise Unusable("no question has another wording")
    return found


def _unknowns(unit: Unit, reply: Unknowns, ledger: Ledger) -> list[tuple[str, str, bool]]:
    """Questions about names that no document holds."""
    texts = [normalised(document.text) for document in ledger.documents()]
    found = []
    for told in reply.unknowns[: unit.input["number"]]:
        name = normalised(told.name)
        if name in normalised(told.question) and not any(name in text for text in texts):
            found.append((told.question, UNKNOWN, False))
    if not found:
        raise Unusable("every name that was invented is in a document, or in no question")
    return found
