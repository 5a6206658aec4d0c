"""MemoryLLM's request fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mem_triton import ids as names
from mem_triton.systems.request import TENANT, RequestError, shown

FIELDS = {
    "mem_pool": 'reads this pool, "name" or "name@version"; "": none',
    "mem_inject": "writes the prompt into this pool; the answer has no tokens",
    "mem_fork": "begins the pool of mem_inject as a copy of this one",
    "mem_seed": "draws the rows that a write drops as the authors' code does under this seed",
}
WITH_INJECT = frozenset({"mem_inject", "mem_fork", "mem_seed", TENANT})
LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class PoolRequest:
    """pool: to read, None for the default one, "" for none. inject: name of the pool that the prompt is written into.

    fork: the pool that a new one begins as. seed: of the draws. tenant: "" is public.
    """

    pool: str | None = None
    inject: str | None = None
    fork: str | None = None
    seed: int | None = None
    tenant: str = ""


def parse(fields: Mapping[str, Any], tenant: str = "") -> PoolRequest:
    """Check a request's fields. Raises RequestError naming the field and the fix."""
    pool, inject, fork = fields.get("mem_pool"), fields.get("mem_inject"), fields.get("mem_fork")
    if pool not in (None, ""):
        _check_reference("mem_pool", pool)
    if inject is not None and not names.is_name(inject):
        raise RequestError("mem_inject", f"must be the name of a pool, {names.NAME_RULE}, got {shown(inject)}")
    if fork is not None:
        _check_reference("mem_fork", fork)
    seed = _seed(fields.get("mem_seed"))
    if inject is None:
        for name, value in (("mem_fork", fork), ("mem_seed", seed)):
            if value is not None:
                raise RequestError(name, "belongs to a write; name the pool that is written in mem_inject")
    else:
        for name in fields:
            if isinstance(name, str) and name.startswith("mem_") and name not in WITH_INJECT:
                raise RequestError(name, "does not go together with mem_inject, which writes and reads nothing else")
    return PoolRequest(pool, inject, fork, seed, tenant)


def _check_reference(field: str, value: Any) -> None:
    found = names.split_reference(value)
    if found is None or not names.is_name(found[0]):
        raise RequestError(field, f'names no pool; a pool is called "name" or "name@version", got {shown(value)}')


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # JSON's numbers may be floats
    if not whole or isinstance(value, bool) or not 0 <= value <= LARGEST_SEED:
        raise RequestError("mem_seed", f"must be a whole number from 0 to 2^63 - 1, got {shown(value)}")
    return int(value)
