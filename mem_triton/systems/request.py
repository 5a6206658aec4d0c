"""Defines the error of a bad request field, and parsers of field values that systems share.

The fields themselves belong to the systems (``MemorySystem.fields``); ``registry.parse_request`` reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mem_triton import ids as names

CARRIER = "mem_triton"
"""Key under which the front end hands the resolved request to the workers; clients may not set it."""
TENANT = "mem_tenant"
LONGEST_MESSAGE = 1000


class RequestError(ValueError):
    """A request that cannot be served as asked; engines answer it with HTTP 400. ``field`` names the field at fault.

    What a client sent is cut in both: it goes into logs and answers.
    """

    def __init__(self, field: str, message: str) -> None:
        field = cut(field, 64)
        super().__init__(cut(f"{field}: {message}", LONGEST_MESSAGE))
        self.field = field


@dataclass(frozen=True)
class MemoryRequest:
    """One request's memory fields, checked. tenant: "" is public. systems: by a system's name, what it made of them."""

    tenant: str = ""
    systems: Mapping[str, Any] = field(default_factory=dict)


def carried_by(params: Any) -> bytes | None:
    """The encoded payload among a request's sampling parameters (any object with ``extra_args``), None if none."""
    return (getattr(params, "extra_args", None) or {}).get(CARRIER)


def cut(text: str, length: int) -> str:
    """The text, or its beginning and dots."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def shown(value: Any) -> str:
    """A value of a client's own in a message: what it looks like, and not more of it than a reader needs."""
    return cut(repr(value if not isinstance(value, (str, bytes)) else value[:200]), 80)


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """A field that is 0 or 1. Raises RequestError for anything else."""
    value = fields.get(name, default)
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    raise RequestError(name, f"must be 0 or 1, got {shown(value)}")


def tenant_of(fields: Mapping[str, Any]) -> str:
    """The tenant that a request names, "" for none. Raises RequestError for what is no name."""
    value = fields.get(TENANT, "")
    if value != "" and not names.is_name(value):
        raise RequestError(TENANT, f"must be {names.NAME_RULE}, got {shown(value)}")
    return value
