"""δ-mem's request fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton import ids as names
from mem_triton.systems.request import RequestError, flag

FIELDS = {
    "mem_session": "starts from this session's state, and commits the state after the last token",
    "mem_write": "0: reads the last committed state and leaves it as it is; without a session: writes no state",
    "mem_read": "1: corrected although it names no session; 0: the plain model, whatever session it names",
    "mem_reset": "1: forgets, and starts the session from zeros again",
}


@dataclass(frozen=True)
class SessionRequest:
    """session: name or None. write: update the state while generating. reset: start from zeros.

    read: whether the state corrects the answer, None for the server's scope. tenant: "" is public.
    """

    session: str | None = None
    write: bool = True
    reset: bool = False
    read: bool | None = None
    tenant: str = ""


def parse(fields: Mapping[str, Any], tenant: str = "") -> SessionRequest:
    """Check a request's fields. Raises RequestError naming the field and the fix."""
    session = fields.get("mem_session")
    if session is not None and not names.is_name(session):
        raise RequestError("mem_session", f"must be {names.NAME_RULE}")
    read = flag(fields, "mem_read", True) if "mem_read" in fields else None
    request = SessionRequest(session, flag(fields, "mem_write", True), flag(fields, "mem_reset", False), read, tenant)
    if request.reset and session is None:
        raise RequestError("mem_reset", "needs mem_session, the session to reset")
    if request.reset and not request.write:
        raise RequestError("mem_reset", "cannot be combined with mem_write 0: a reset is a write")
    if request.read is False:
        for name in ("mem_reset", "mem_write"):
            if name in fields and flag(fields, name, False):
                raise RequestError(name, "cannot be combined with mem_read 0: a state that is not read is not written")
    return request
