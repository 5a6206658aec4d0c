"""Reads a model's reply as the JSON that it was asked for: parse, then repair, then say what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import json_repair
from pydantic import ValidationError

from mem_triton.systems.memo.protocol.schemas import Reply

R = TypeVar("R", bound=Reply)
LONGEST = 65536
"""Characters of a reply that are looked at."""
DEEPEST = 32
"""Nested brackets of a reply; no schema of ours has more than six."""
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def without_thought(text: str) -> str:
    """The reply without a leading block of reasoning between <think> marks."""
    text = text[:LONGEST].strip()
    return _THOUGHT.sub("", text, count=1).strip() if text.startswith("<think>") else text


def read_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """(the JSON object in a reply, "") or (None, what is wrong). Raises nothing, whatever the text."""
    text = without_thought(text)
    if not text:
        return None, "the reply is empty"
    start = text.find("{")
    if start < 0:
        return None, "the reply holds no JSON object"
    if _depth(text) > DEEPEST:
        return None, "the reply is nested too deep"
    try:
        value, _ = json.JSONDecoder().raw_decode(text[start:])
    except (ValueError, RecursionError):
        try:
            value = json_repair.loads(text[start:])
        except (ValueError, RecursionError) as error:
            return None, f"the reply is no JSON: {error}"
    if isinstance(value, list) and value and isinstance(value[0], dict):  # several objects: the first was asked for
        value = value[0]
    if not isinstance(value, dict) or not value:
        return None, "the reply is not one JSON object"
    return value, ""


def is_whole(text: str) -> bool:
    """Whether a reply's JSON object is there to its end and needs no repair."""
    text = without_thought(text)
    try:
        json.JSONDecoder().raw_decode(text[max(text.find("{"), 0) :])
    except (ValueError, RecursionError):
        return False
    return True


def read_reply(text: str, model: type[R]) -> tuple[R | None, str]:
    """(the reply, "") or (None, what is wrong, for the model that is asked again). Raises nothing."""
    value, wrong = read_object(text)
    if value is None:
        return None, wrong
    try:
        return model.model_validate(value), ""
    except ValidationError as error:
        first = error.errors()[:3]
        return None, "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the object'}: {e['msg']}" for e in first)


def is_prose(text: str) -> bool:
    """Whether a reply is a text in words and no attempt at JSON."""
    text = without_thought(text)
    try:
        json.loads(text[:LONGEST])
    except (ValueError, RecursionError):
        return any(c.isalpha() for c in text) and not any(c in "{[" for c in text)
    return False


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(0, depth - 1)
    return deepest
