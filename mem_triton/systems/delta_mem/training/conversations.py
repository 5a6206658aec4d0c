"""Conversations to train on: chat JSONL, folders of it, or a folder that ``datasets`` saved.

A row is a session of one or more requests, each a chat with a context of its own; only the memory's state passes from
one to the next::

    {"requests": [[{"role": "user", "content": "My locker is 12."}], [{"role": "user", "content": "My locker?"},
                  {"role": "assistant", "content": "12."}]], "stage": 0, "group": "1 fact"}

or one chat, ``{"messages": [...]}``, the form of TRL and of most public data: its last turn is what is asked, all turns
before it are what was told (the episodes of arXiv 2605.12357's training). A chat of one turn tells nothing: it shows
what must stay as it is. A request that ends with the user's message is answered by the model itself before training.

stage: rows of a higher stage come when the lower ones are learnt. group: rows that are evaluated together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem_triton.systems.json_lines import json_rows

ROLES = ("system", "user", "assistant")
FIELDS = ("requests", "messages", "stage", "group")
SUFFIXES = (".jsonl", ".ndjson")
SHAPE = '{"messages": [{"role": "user", "content": "..."}, ...]} or {"requests": [[...], [...]]}'


class DataError(ValueError):
    """Conversations that cannot be used; the message names file, row, field and what was expected."""


@dataclass(frozen=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


Chat = tuple[ChatMessage, ...]


@dataclass(frozen=True)
class Conversation:
    """A session: what was told, request by request, and the chat whose last reply is trained.

    told: empty for a chat that shows what must stay. where: file and row, for messages.
    """

    told: tuple[Chat, ...]
    asked: Chat
    stage: int = 0
    group: str = ""
    where: str = ""

    def in_context(self) -> Chat:
        """All that was told and the question in one chat; later system messages go."""
        messages: list[ChatMessage] = []
        for chat in (*self.told, self.asked):
            messages += [m for m in chat if m.role != "system" or not messages]
        return tuple(messages)


def read_conversations(path: Path) -> list[Conversation]:
    """All rows of a file, of the ``.jsonl`` files of a folder in order, or of a folder of ``datasets``.

    Raises DataError naming the file, the row and the fix; FileNotFoundError.
    """
    if not path.exists():
        raise FileNotFoundError(f"DATA: there is no {path}")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        rows = _saved(path) if saved else (row for file in files for row in json_rows(file, SHAPE, DataError))
        if not saved and not files:
            raise DataError(f"DATA: {path} holds no {' or '.join(SUFFIXES)} file, and no data set saved by datasets")
    else:
        rows = json_rows(path, SHAPE, DataError)
    found = [read_conversation(row, where) for where, row in rows]
    if not found:
        raise DataError(f"DATA: {path} holds no rows; expected {SHAPE}")
    return found


def _saved(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ImportError(f'{path} was saved by datasets: pip install "mem-triton[train]" reads it') from None
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever Arrow or fsspec makes of damaged files
        raise DataError(f"{path} cannot be read by datasets: {type(error).__name__}: {error}") from None
    if not isinstance(data, datasets.Dataset):
        splits = sorted(data)
        if "train" not in splits:
            raise DataError(f"{path} has the splits {', '.join(splits)}, none called train: give one split's folder")
        data = data["train"]
    for number, row in enumerate(data):
        yield f"{path}, row {number}", {key: value for key, value in row.items() if value is not None}


def read_conversation(row: Any, where: str) -> Conversation:
    """One row. where: file and row, for messages. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: holds a {type(row).__name__}, expected {SHAPE}")
    if ("requests" in row) == ("messages" in row):
        has = "both requests and messages" if "requests" in row else f"only {', '.join(map(str, row)) or 'nothing'}"
        raise DataError(f"{where}: has {has}; expected {SHAPE}")
    stage, group = row.get("stage", 0), row.get("group", "")
    if isinstance(stage, bool) or not isinstance(stage, int) or stage < 0:
        raise DataError(f"{where}: stage is {stage!r:.80}, expected an integer from 0")
    if not isinstance(group, str):
        raise DataError(f"{where}: group is {group!r:.80}, expected a text")
    if "requests" in row:
        chats = row["requests"]
        if not isinstance(chats, (list, tuple)) or not chats:
            raise DataError(f"{where}: requests is {chats!r:.80}, expected a list of chats, each a list of messages")
        parsed = [_chat(chat, f"{where}: requests[{i}]") for i, chat in enumerate(chats)]
        return Conversation(tuple(parsed[:-1]), parsed[-1], stage, group, where)
    chat = _chat(row["messages"], f"{where}: messages")
    last = max(i for i, message in enumerate(chat) if message.role == "user")
    head = chat[:1] if chat[0].role == "system" else ()
    before = chat[len(head) : last]
    return Conversation(((*head, *before),) if before else (), (*head, *chat[last:]), stage, group, where)


def _chat(messages: Any, where: str) -> Chat:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where} is {messages!r:.80}, expected a list of messages")
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f'{where}[{i}] is {message!r:.80}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f"{where}[{i}].role is {role!r:.80}, expected {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where}[{i}].content is {content!r:.80}, expected a text that is not blank")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{where}[{i}].content holds half of a surrogate pair ({half!r}); correct it") from None
        chat.append(ChatMessage(role, content))
    turns = [m.role for m in chat if m.role != "system"]
    if any(m.role == "system" for m in chat[1:]):
        raise DataError(f"{where} has a system message that is not its first")
    for i, role in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise DataError(f"{where}: message {i} (without system) is the {role}'s; user and assistant take turns")
    if not turns:
        raise DataError(f"{where} has no message of the user")
    return tuple(chat)
