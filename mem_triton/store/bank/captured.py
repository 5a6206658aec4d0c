"""The namespace of what requests capture: "capture:NAME" for everybody's, "capture.TENANT:NAME" for a tenant's own.

``mem-triton write`` cannot write there and a capture nowhere else, so no client replaces what an operator wrote.
Everybody's captures belong to a tenant that no request can name: they are read by their ids and by no search, so no
client decides what others retrieve.
"""

from __future__ import annotations

SOURCE = "mem_capture"
"""``source`` of captured entries, and of no others."""
EVERYBODY = "capture:"
"""The tenant of captures without one; no tenant's name has a colon."""


def captured_id(name: str, tenant: str) -> str:
    """Return the entry's id of what ``tenant`` ("" for none) captures as ``name``."""
    return f"capture.{tenant}:{name}" if tenant else f"capture:{name}"


def is_captured(id: str) -> bool:
    """Whether an id lies in the namespace."""
    space, colon, _ = id.partition(":")
    return bool(colon) and (space == "capture" or space.startswith("capture."))


def reader_of(id: str, tenant: str) -> str:
    """The tenant as which a request of ``tenant`` reads ``id``, which may have a version."""
    return EVERYBODY if id.startswith(captured_id("", "")) else tenant


def owner_of(tenant: str) -> str:
    """The tenant to which an entry belongs that ``tenant`` captures."""
    return tenant or EVERYBODY
