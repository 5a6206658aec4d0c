"""Finds the tenant of a request, by its API key or a trusted proxy's header.

Without a binding in the configuration ``mem_tenant`` is a label: it sorts what belongs together, and whoever knows a
tenant's name reads and writes what is that tenant's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping

from mem_triton import ids as names
from mem_triton.config import ConfigError, TenantsSection
from mem_triton.systems.request import RequestError


class Tenants:
    """What binds requests to tenants. Raises ConfigError for a variable that is not set, and for a key given twice.

    Example::

        tenants = Tenants(TenantsSection(keys={"env:ACME_KEY": "acme"}))
        tenants.bind("", {"authorization": "Bearer ..."})      # "acme"
    """

    def __init__(self, section: TenantsSection | None) -> None:
        self._header = section.header if section is not None else None
        self._keys: dict[bytes, str] | None = None  # SHA-256 of each key -> its tenant
        if section is not None and section.keys is not None:
            self._keys = {}
            for key, tenant in section.keys.items():
                digest = _digest(key)
                if self._keys.setdefault(digest, tenant) != tenant:
                    raise ConfigError(f'mem_triton.tenants.keys: the key of "{tenant}" is also another tenant\'s')

    def bind(self, named: str, headers: Mapping[str, str] | None) -> str:
        """The tenant that a request is sent for. Raises RequestError if it names another one. named: "" for none.

        headers: of its HTTP request, by lower-case names (or starlette's); None if it came from Python code, which
        holds the whole engine and is asked for nothing.
        """
        if headers is None or (self._header is None and self._keys is None):
            return named
        bound = self._by_header(headers) if self._keys is None else self._by_key(headers)
        if named not in ("", bound):
            raise RequestError(
                "mem_tenant",
                "is not the tenant that this request is sent for; leave the field out"
                if bound
                else "this request is sent for no tenant, and this server binds tenants to "
                + (f"the header {self._header}" if self._header else "its API keys"),
            )
        return bound

    def _by_key(self, headers: Mapping[str, str]) -> str:
        scheme, _, key = (headers.get("authorization") or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        bound = ""
        for digest, tenant in self._keys.items():  # all of them: the time says nothing about any
            if hmac.compare_digest(given, digest) and scheme.lower() == "bearer":
                bound = tenant
        return bound

    def _by_header(self, headers: Mapping[str, str]) -> str:
        name = self._header.lower()
        values = headers.getlist(name) if hasattr(headers, "getlist") else [headers.get(name)]
        values = [value for value in values if value]
        if len(values) > 1:
            raise RequestError("mem_tenant", f"the header {self._header} is there {len(values)} times; send it once")
        if values and not names.is_name(values[0]):
            raise RequestError("mem_tenant", f"the header {self._header} must name {names.NAME_RULE}")
        return values[0] if values else ""


def _digest(key: str) -> bytes:
    """SHA-256 of a key as the configuration gives it."""
    kind, _, value = key.partition(":")
    if kind == "sha256":
        return bytes.fromhex(value)
    if not os.environ.get(value):
        raise ConfigError(f"mem_triton.tenants.keys: the environment variable {value} is not set, or empty")
    return hashlib.sha256(os.environ[value].strip().encode()).digest()
