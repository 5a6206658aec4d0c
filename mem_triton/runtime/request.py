"""The words a request may say about its memory, whatever engine carries them.

vLLM carries them in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args`` (Python)::

    {"mem_session": "alice"}                     # start from alice's state, commit the state after the last token
    {"mem_session": "alice", "mem_write": 0}     # read alice's last committed state, leave it as it is
    {"mem_session": "alice", "mem_reset": 1}     # forget: start alice from zeros again
    {"mem_write": 0}                             # this request writes no memory (with no session: the plain model)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton.config import nearest_name_hint

WORDS = ("mem_session", "mem_write", "mem_reset")
CARRIER = "mem_triton"
"""Key under which the front end hands the resolved request to the workers; clients may not set it."""

_SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RequestError(ValueError):
    """A request that cannot be served as asked; engines answer it with HTTP 400. ``field`` names the word at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class MemoryRequest:
    """One request's memory words, checked. session: name or None. write: update the state while generating."""

    session: str | None = None
    write: bool = True
    reset: bool = False


def carried_by(params: Any) -> Mapping[str, Any] | None:
    """What the front end put into a request's sampling parameters (any object with ``extra_args``), None if nothing."""
    return (getattr(params, "extra_args", None) or {}).get(CARRIER)


def _flag(words: Mapping[str, Any], name: str, default: bool) -> bool:
    value = words.get(name, default)
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    raise RequestError(name, f"must be 0 or 1, got {value!r}")


def parse_request(extra_args: Mapping[str, Any] | None) -> MemoryRequest:
    """Check the memory words among an engine's extra arguments; words of others pass untouched.

    Raises RequestError naming the word and the fix: unknown ``mem_*`` words, bad values, bad combinations.
    """
    words = extra_args or {}
    if CARRIER in words:
        raise RequestError(CARRIER, "is reserved for mem_triton's own use; remove it from the request")
    for name in words:
        if isinstance(name, str) and name.startswith("mem_") and name not in WORDS:
            raise RequestError(name, "unknown memory word." + nearest_name_hint(name, WORDS))
    session = words.get("mem_session")
    if session is not None and not (isinstance(session, str) and _SESSION_NAME.fullmatch(session)):
        raise RequestError(
            "mem_session", "must be 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    request = MemoryRequest(session, _flag(words, "mem_write", True), _flag(words, "mem_reset", False))
    if request.reset and session is None:
        raise RequestError("mem_reset", "needs mem_session, the session to reset")
    if request.reset and not request.write:
        raise RequestError("mem_reset", "cannot be combined with mem_write 0: a reset is a write")
    return request
