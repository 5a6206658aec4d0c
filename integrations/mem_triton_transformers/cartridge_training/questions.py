"""Questions about a document: read from a file, or asked by the model itself with a chunk of it in its context."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem_triton.systems.json_lines import json_rows
from mem_triton.systems.memo.training.rows import RowError, messages_of
from mem_triton_transformers.cartridge_training.decoding import Sampling, reply_all
from mem_triton_transformers.runs.folders import TrainingError

SHAPE = '{"question": "...", "answer": "..."} (the answer is optional), or a row of `mem-triton memo build`'
_SEEDS = (
    "Ask one short question about a fact in the text.",
    "Ask one short question about a name in the text.",
    "Ask one short question about a number or a date in the text.",
    "Ask one short question about where or how something in the text happens.",
    "Ask one short question that someone who looks something up in the text would ask.",
)
_ROUNDS = 4
"""How often the model is asked for questions at most: small ones repeat themselves."""


@dataclass(frozen=True)
class Question:
    """One question. answer: what a right reply says, None if nobody has said it. chunk: index of its chunk."""

    text: str
    answer: str | None = None
    chunk: int = 0


def read_questions(path: Path, chunks: Sequence[str]) -> list[Question]:
    """The questions of a file: JSONL, or plain text with one a line; each is about the chunk with most of its words.

    Raises TrainingError naming the file, the line, the field and the fix.
    """
    if path.suffix in (".jsonl", ".json"):
        found = [_question(row, where) for where, row in json_rows(path, SHAPE, TrainingError, "--questions")]
    else:
        found = [(line.strip(), None) for line in _text(path).splitlines() if line.strip()]
    if len(found) < 2:
        raise TrainingError(f"--questions: {path} holds {len(found)} question(s), and at least two are needed")
    words = [_words(chunk) for chunk in chunks]
    return [Question(text, answer, _nearest(f"{text} {answer or ''}", words)) for text, answer in found]


def ask(
    model: Any,
    tokenizer: Any,
    chunks: Sequence[str],
    count: int,
    most_tokens: int,
    seed: int,
    render: Callable[[str, str], list[int]],
    say: Callable[[str], None],
) -> list[Question]:
    """About ``count`` different questions of the model's own, spread over the chunks.

    render: prompt tokens of (chunk, request). Raises TrainingError if the model asks no two.
    """
    found: dict[str, Question] = {}
    for turn in range(_ROUNDS):
        wanted = [(i, one) for i in range(len(chunks)) for one in _SEEDS]
        wanted *= -(-(count - len(found)) // len(wanted))
        prompts = [render(chunks[i], one) for i, one in wanted]
        replies = reply_all(model, prompts, most_tokens, Sampling(0.9, 0.95, seed + turn))
        for (chunk, _), reply in zip(wanted, replies, strict=True):
            if (text := _asked(tokenizer.decode(reply, skip_special_tokens=True))) and text.casefold() not in found:
                found[text.casefold()] = Question(text, None, chunk)
        say(f"questions of the model's own: {min(len(found), count)} of {count}")
        if len(found) >= count:
            break
    if len(found) < 2:
        raise TrainingError("MODEL: it asks no two questions about the document by itself; give some with --questions")
    return list(found.values())[:count]


def _asked(text: str) -> str | None:
    """The first question of a reply."""
    match = re.search(r"[^\n?!:]*\w[^\n?!:]*\?", text)
    found = match.group().rpartition(". ")[2].strip(" \"'*-0123456789.") if match else ""
    return f"{found.rstrip('?')}?" if 8 <= len(found) <= 300 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrainingError(f"--questions: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TrainingError(f"--questions: {path}: not UTF-8 text (byte {error.start}); convert it first") from None


def _question(row: Any, where: str) -> tuple[str, str | None]:
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: holds a {type(row).__name__}, expected {SHAPE}")
    if "question" not in row and "prompt" in row:
        try:
            prompt, *answer = [
                messages_of(row[name], where, name)[-1][1] for name in ("prompt", "completion") if name in row
            ]
        except RowError as error:
            raise TrainingError(str(error)) from None
        return prompt.strip(), next(iter(answer), None)
    text, answer = row.get("question"), row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise TrainingError(f"{where}: question is {text!r:.80}; expected {SHAPE}")
    if answer is not None and not isinstance(answer, str):
        raise TrainingError(f"{where}: answer is {answer!r:.80}; expected {SHAPE}")
    return text.strip(), answer


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _nearest(text: str, words: Sequence[set[str]]) -> int:
    asked = _words(text)
    return max(range(len(words)), key=lambda i: (len(asked & words[i]), -i))
