"""Rows to train a memory model on: prompt and completion, as ``mem-triton memo build`` writes them and trl reads them::

    {"prompt": [{"role": "user", "content": "Where was Mara Stone born?"}],
     "completion": [{"role": "assistant", "content": "Mara Stone was born in Oslo."}]}

A plain text as prompt is the user's question, one as completion the answer. epoch: a row with one is shown in that
epoch alone, and where there are more epochs than such numbers, they come around again: so names that nobody knows can
be fresh ones each time. All other rows are shown in every epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem_triton.systems.json_lines import json_rows

Message = dict[str, str]
SHAPE = '{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}]}'
TRAIN, HELD_OUT = "train.jsonl", "eval.jsonl"
"""Files in the folder of a build."""


class RowError(ValueError):
    """Rows that cannot be used; the message names file, row, field and what was expected."""


@dataclass(frozen=True)
class Row:
    """A question with its answer. prompt: the messages before it; where: file and row, for messages."""

    prompt: tuple[tuple[str, str], ...]
    answer: str
    epoch: int | None = None
    where: str = ""

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat templates take it."""
        return [{"role": role, "content": content} for role, content in self.prompt]


def read_rows(path: Path, option: str = "DATA") -> list[Row]:
    """The rows of a JSONL file. Raises RowError naming the file, the row, the field and the fix."""
    if not path.is_file():
        raise RowError(f"{option}: there is no file {path}")
    found = [row_of(row, where) for where, row in json_rows(path, SHAPE, RowError)]
    if not found:
        raise RowError(f"{option}: {path} holds no rows; expected {SHAPE}")
    return found


def read_data(data: Path, held_out: Path | None, mix: Sequence[Path] = ()) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to evaluate on). data: a JSONL file, or the folder of a build, whose ``eval.jsonl`` is
    evaluated on unless ``held_out`` names another file. mix: files of older rows, trained on as well."""
    if data.is_dir():
        if not (data / TRAIN).is_file():
            raise RowError(f"DATA: {data} holds no {TRAIN}; give a folder that `mem-triton memo build` made, or a file")
        if held_out is None and (data / HELD_OUT).is_file() and (data / HELD_OUT).stat().st_size:
            held_out = data / HELD_OUT
        data = data / TRAIN
    rows = read_rows(data)
    for older in mix:
        rows += read_rows(older, "--mix")
    return rows, read_rows(held_out, "--held-out") if held_out is not None else []


def digest(rows: Iterable[Row]) -> str:
    """sha256 of what is trained on, wherever it lay."""
    text = json.dumps([[row.prompt, row.answer, row.epoch] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def of_epoch(rows: Sequence[Row], epoch: int) -> list[int]:
    """Indices of the rows that are shown in an epoch, 0 being the first."""
    numbers = [row.epoch for row in rows if row.epoch is not None]
    around = max(numbers) + 1 if numbers else 1
    return [i for i, row in enumerate(rows) if row.epoch is None or row.epoch == epoch % around]


def row_of(row: Any, where: str) -> Row:
    """Make a row of what JSON says. where: file and row, for messages. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError(f"{where}: holds a {type(row).__name__}, expected {SHAPE}")
    if missing := [name for name in ("prompt", "completion") if name not in row]:
        raise RowError(f"{where}: has no {missing[0]}; expected {SHAPE}")
    epoch = row.get("epoch")
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch < 10_000):
        raise RowError(f"{where}: epoch is {epoch!r:.80}, expected an integer from 0 to 9999")
    prompt, completion = (messages_of(row[name], where, name) for name in ("prompt", "completion"))
    if prompt[-1][0] != "user":
        raise RowError(f"{where}: prompt ends with the {prompt[-1][0]}'s message, expected the user's")
    if len(completion) != 1 or completion[0][0] != "assistant":
        raise RowError(f"{where}: completion is not one message of the assistant; expected {SHAPE}")
    return Row(prompt, completion[0][1], epoch, where)


def messages_of(value: Any, where: str, name: str) -> tuple[tuple[str, str], ...]:
    """Give (role, content) of each message of a row's prompt or completion, which ``name`` says.

    where: file and row, for messages. Raises RowError.
    """
    if isinstance(value, str):
        value = [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(f"{where}: {name} is {value!r:.80}, expected a text or a list of messages")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RowError(f'{where}: {name}[{i}] is {message!r:.80}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise RowError(f"{where}: {name}[{i}].role is {role!r:.80}, expected system, user or assistant")
        if not isinstance(content, str) or not (content.strip() or role == "system"):
            raise RowError(f"{where}: {name}[{i}].content is {content!r:.80}, expected a text that is not blank")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise RowError(
                f"{where}: {name}[{i}].content holds half of a surrogate pair ({half!r}); correct it"
            ) from None
        found.append((role, content))
    return tuple(found)
