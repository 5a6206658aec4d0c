"""Packs what the front end resolved into one string among a request's ``custom_params``, and reads it in workers.

SGLang's messages allow scalars, and lists or tables of scalars, there; deeper ones end the process that reads them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from mem_triton.systems.payload import PayloadError, RequestPayload, encode
from mem_triton.systems.request import CARRIER


def packed(fields: Mapping[str, Any] | None, payload: RequestPayload | None) -> dict[str, Any] | None:
    """A request's ``custom_params`` for the workers: without memory's fields, which have been answered."""
    others = {name: value for name, value in (fields or {}).items() if not is_memory_field(name)}
    if payload is None:
        return others or None
    return {**others, CARRIER: base64.b64encode(encode(payload)).decode()}


def has_carried(params: Any) -> bool:
    """Whether the front end put anything there."""
    return CARRIER in (getattr(params, "custom_params", None) or {})


def carried_of(params: Any) -> bytes | None:
    """The encoded payload among a request's sampling parameters, None if there is none. Raises PayloadError."""
    text = (getattr(params, "custom_params", None) or {}).get(CARRIER)
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise PayloadError(f"a request's memory payload is no base64: {error}") from None


def is_memory_field(name: Any) -> bool:
    """Whether a key of ``custom_params`` is memory's."""
    return isinstance(name, str) and name.startswith("mem_")
