"""What every configuration has, whatever memory systems are installed, and the error that names a wrong key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mem_triton import ids as names

_KEY = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|sha256:[0-9A-Fa-f]{64}")


class ConfigError(ValueError):
    """A configuration value that mem_triton cannot use; the message names the key and the fix."""


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name closest to ``name``, or the list of known names."""
    known = sorted(known)
    name = name[:100]  # a longer one is like no known one, and slow to compare
    match = difflib.get_close_matches(name, known, n=1)
    if not match and not known:
        return ""
    return f' Did you mean "{match[0]}"?' if match else f" Known: {', '.join(known)}."


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TenantsSection(Section):
    """Who may speak for which tenant; without it ``mem_tenant`` is a label that every client may choose.

    keys: API keys of the server, as "env:VARIABLE" or "sha256:HEX", never in plain text, each with its tenant.
    header: the HTTP header in which a proxy that you trust, and that sets it on every request, names the tenant.
    """

    keys: dict[str, str] | None = None
    header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")

    @field_validator("keys", mode="before")
    @classmethod
    def _check_keys(cls, keys: Any) -> Any:
        if keys is None:
            return None
        if not isinstance(keys, Mapping) or not keys:
            raise ValueError('must be an object like {"env:ACME_KEY": "acme"}')
        for number, (key, tenant) in enumerate(keys.items(), start=1):
            if not isinstance(key, str) or not _KEY.fullmatch(key):  # never shown: it may be the key itself
                raise ValueError(
                    f'key {number} is neither "env:VARIABLE" nor "sha256:" and 64 hexadecimal digits '
                    "(printf %s KEY | sha256sum)"
                )
            if not names.is_name(tenant):
                raise ValueError(f"tenant {tenant!r}: must be {names.NAME_RULE}")
        return keys

    @model_validator(mode="after")
    def _check_one(self) -> TenantsSection:
        if (self.keys is None) == (self.header is None):
            raise ValueError("needs keys or header, and not both")
        return self


class General(Section):
    """The ``mem_triton`` section of an engine's configuration: one section a memory system, and what they share.

    tenants: what binds requests to tenants.
    session_dir: folder for committed session states; None keeps them in the server's memory only.
    deterministic: memory's own kernels give a row the same bits in any batch; ``docs/numerics.md`` says what is
        promised. The engine's own such mode turns this on, too; for whole answers both are needed.
    max_sessions: sessions kept in memory. With ``session_dir`` the least recently used one leaves memory and stays
        on disk; without it a new session beyond the limit is refused, because nothing may be lost silently.
    """

    tenants: TenantsSection | None = None
    deterministic: bool = False
    session_dir: Path | None = None
    max_sessions: int = Field(default=4096, ge=1)

    def section(self, system: str) -> Any:
        """A memory system's section; None where the system is not configured."""
        return getattr(self, system)
