"""Describes one place where an integration changes an engine; each integration lists its own in ``patches.PATCHES``.

``docs/engine-patches.md`` is made of the lists, and ``tests/house/test_engine_patches.py`` fails on a change of an
engine that no list names. Imports nothing, so that the lists can be read where no engine is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["patch", "hook", "object", "extension", "request", "process"]
KINDS: dict[Kind, str] = {
    "patch": "replaces a function or a class of the engine in this process",
    "hook": "is called by the engine, or by torch, through a hook mechanism of its own",
    "object": "replaces or adds attributes of one object that the engine made; its class stays as it is",
    "extension": "is registered at a documented extension point of the engine",
    "request": "sets fields of one request or one answer, objects that end with it",
    "process": "sets something that the whole process sees, such as an environment variable",
}
"""Kind of change -> what it means, from the one that leans most on the engine's internals to the ones that do not."""


@dataclass(frozen=True)
class EnginePatch:
    """One change of an engine.

    target: what is changed, by its import path where it has one. kind: see ``KINDS``. sites: where our code does it,
    as "module.function: expression", the way the house test finds and spells it; a "*" at the end stands for any rest.
    what: what happens there. why: which need of memory it serves. upstream: what the engine offers or lacks for it.
    until: when it can go.
    """

    target: str
    kind: Kind
    sites: tuple[str, ...]
    what: str
    why: str
    upstream: str
    until: str


def names(patch: EnginePatch, site: str) -> bool:
    """Whether an entry names a site."""
    return any(site.startswith(own[:-1]) if own.endswith("*") else site == own for own in patch.sites)
