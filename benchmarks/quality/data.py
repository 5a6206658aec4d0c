"""The invented documents, their questions, and which documents are attached to which question."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

DOCUMENTS = Path(__file__).with_name("documents.jsonl")


@dataclass(frozen=True)
class Document:
    """One invented document. kind: facts, table, procedure or dialogue."""

    id: str
    kind: str
    language: str
    text: str


@dataclass(frozen=True)
class Question:
    """One question. document: the id of the one that has the answer; answers: each of them is right."""

    document: str
    text: str
    answers: tuple[str, ...]


def load(path: Path = DOCUMENTS) -> tuple[dict[str, Document], list[Question]]:
    """The documents by id, and all questions."""
    documents, questions = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        asked = record.pop("questions")
        documents[record["id"]] = Document(**record)
        questions += [Question(record["id"], text, tuple(answers)) for text, *answers in asked]
    return documents, questions


def attached(questions: list[Question], documents: dict[str, Document], count: int) -> list[list[str]]:
    """``count`` documents for each question, the one with the answer at a random place among others."""
    rng, chosen = random.Random(count), []
    for question in questions:
        ids = rng.sample([id for id in documents if id != question.document], count - 1)
        ids.insert(rng.randrange(count), question.document)
        chosen.append(ids)
    return chosen
