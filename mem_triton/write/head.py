"""The head of a chat: what a chat template puts before a user's words, such as a system prompt and a turn's opening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARK = "memtritonwords"
MARKER = "mem_triton.json"
"""A file of a model's folder that says what it was trained for: ``{"sparse_references": true}``."""


class HeadError(ValueError):
    """A chat template that gives no head, or a model's folder that cannot be read; the message names it."""


def chat_head(tokenizer: Any, system: str | None = None) -> str | None:
    """The text before a user's words in a chat of one message; None without a chat template.

    system: a system prompt, None for what the template has by default. Raises HeadError if the template cannot render
    such a chat, or changes the user's words.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": MARK})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like about a chat that they do not want
        raise HeadError(f"the chat template does not render such a chat: {error}") from None
    head, found, _ = text.partition(MARK)
    if not found:
        raise HeadError("the chat template leaves the user's words out")
    return head


def reads_sparse_references(folder: Path) -> bool:
    """Whether a model's folder says that the model was trained with sparse references. Raises HeadError."""
    path = folder / MARKER
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"{path}: {error}; write --kind, or mend it") from None
    trained = said.get("sparse_references", False) if isinstance(said, dict) else None
    if not isinstance(trained, bool):
        raise HeadError(f'{path}: expected an object like {{"sparse_references": true}}; write --kind, or mend it')
    return trained
