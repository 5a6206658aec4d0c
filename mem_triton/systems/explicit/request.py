"""Explicit memory's request fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton import ids as names
from mem_triton.systems.request import RequestError, flag, shown

FIELDS = {
    "mem_ids": "attends to these entries of the bank",
    "mem_top_k": "retrieves so many references a chunk; 0: none for this request",
    "mem_query": "what references are searched by, instead of a chat's last user message",
    "mem_capture": "keeps what this prompt says as an entry of the bank, under this name",
    "mem_capture_answer": "1: with the answer",
    "mem_replace": "1: in place of an earlier capture of that name",
}
LONGEST_QUERY = 4096
MOST_IDS = 1024
MOST_REFERENCES = 64
"""References that a request may retrieve for a chunk."""


@dataclass(frozen=True)
class ReadingRequest:
    """ids: entries to attend to, None if the request names none (an empty tuple: explicitly no entry).

    top_k: references a chunk, None for the server's setting. query: what references are searched by, None for what the
    prompt says. capture: name to keep the prompt under, capture_answer: with its answer, replace: in place of an
    earlier capture. tenant: "" is public.
    """

    ids: tuple[str, ...] | None = None
    top_k: int | None = None
    query: str | None = None
    capture: str | None = None
    capture_answer: bool = False
    replace: bool = False
    tenant: str = ""


def parse(fields: Mapping[str, Any], tenant: str = "") -> ReadingRequest:
    """Check a request's fields. Raises RequestError naming the field and the fix."""
    request = ReadingRequest(
        _ids(fields),
        _top_k(fields),
        _query(fields),
        _capture(fields),
        flag(fields, "mem_capture_answer", False),
        flag(fields, "mem_replace", False),
        tenant,
    )
    for name in ("mem_capture_answer", "mem_replace"):
        if name in fields and request.capture is None:
            raise RequestError(name, "needs mem_capture, the name to keep the prompt under")
    return request


def _ids(fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    ids = fields.get("mem_ids")
    if ids is None:
        return None
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, (list, tuple)):
        raise RequestError("mem_ids", f'must be a list of ids like "alice" or "alice@2", got {shown(ids)}')
    if len(ids) > MOST_IDS:
        raise RequestError("mem_ids", f"names {len(ids)} entries, a request may name {MOST_IDS}")
    found = [_id(id) for id in ids]
    return tuple(dict.fromkeys(found))  # an entry named twice is one memory


def _id(said: Any) -> str:
    if names.split_places(said):
        return said
    if (reference := names.split_reference(said)) is None:
        old = isinstance(said, str) and names.OLD_ID.fullmatch(said.partition("@")[0])
        hint = "; an entry of an older bank gets another id by `mem-triton bank rename`" if old else ""
        raise RequestError(
            "mem_ids", f'{said!r} is no id; ids look like "alice", "alice@2" or, in a document, "alice#0"{hint}'
        )
    id, version = reference
    return id if version is None else f"{id}@{version}"


def _top_k(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("mem_top_k")
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value not in range(MOST_REFERENCES + 1):
        raise RequestError("mem_top_k", f"must be a whole number from 0 to {MOST_REFERENCES}, got {shown(value)}")
    return int(value)


def _query(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("mem_query")
    if value is not None and not (isinstance(value, str) and value.strip() and len(value) <= LONGEST_QUERY):
        raise RequestError("mem_query", f"must be text of 1 to {LONGEST_QUERY} characters, got {shown(value)}")
    return value


def _capture(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("mem_capture")
    if value is not None and not names.is_id(value):
        raise RequestError("mem_capture", f"must be {names.ID_RULE}, got {shown(value)}")
    return value
