"""The memory systems that are installed, found by their configuration section.

Those of this package stand in ``BUILT_IN``. Another distribution adds one by an entry point::

    [project.entry-points."mem_triton.systems"]
    toy = "my_package.toy:SYSTEM"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mem_triton.schema import ConfigError, nearest_name_hint
from mem_triton.systems.base import Capability, MemorySystem, missing
from mem_triton.systems.request import CARRIER, TENANT, MemoryRequest, RequestError, tenant_of

GROUP = "mem_triton.systems"
BUILT_IN = (
    "mem_triton.systems.delta_mem.system",
    "mem_triton.systems.explicit.system",
    "mem_triton.systems.memo.system",
    "mem_triton.systems.memoryllm.system",
)
"""Modules with a ``SYSTEM``, in the order in which their parts are asked."""
GENERAL = {TENANT: "sees this tenant's entries and sessions besides the public entries"}
"""Request fields that belong to no system."""


@cache
def systems() -> Mapping[str, MemorySystem]:
    """Every installed system, by name. Raises ConfigError for one that cannot be loaded or takes another's name."""
    found: dict[str, MemorySystem] = {}
    for system in (*(import_module(module).SYSTEM for module in BUILT_IN), *_others()):
        taken = [name for other in found.values() for name in (other.name, *other.fields)]
        if clash := sorted({system.name, *system.fields} & {*taken, *GENERAL}):
            raise ConfigError(f"memory system {system.name}: {', '.join(clash)} belongs to another memory system")
        found[system.name] = system
    return found


def _others() -> Iterable[MemorySystem]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            yield point.load()
        except Exception as error:
            raise ConfigError(f"memory system {point.name} ({point.value}) cannot be loaded: {error}") from error


def fields() -> Mapping[str, str]:
    """Every request field that some system, or none in particular, understands, with what it means."""
    return {name: help for system in systems().values() for name, help in system.fields.items()} | GENERAL


def check_capabilities(names: Iterable[str], capabilities: Iterable[Capability], engine: str) -> None:
    """Raise ConfigError, by name, for a system that needs what the engine lacks, and for two that need one thing."""
    chosen = [systems()[name] for name in names]
    for system in chosen:
        if lacks := missing(system.requires, capabilities):
            raise ConfigError(f"mem_triton.{system.name}: {engine} lacks what {system.title} needs: {'; '.join(lacks)}")
    for capability in (Capability.STATE, Capability.SEGMENTS):
        if len(both := [system for system in chosen if capability in system.requires]) > 1:
            raise ConfigError(
                f"mem_triton.{both[1].name}: {both[1].title} and {both[0].title} both need {capability.value}, which "
                "one system has at a time; configure one of them"
            )


def required(names: Iterable[str]) -> frozenset[Capability]:
    """What these systems need of an engine's workers."""
    return frozenset().union(*(systems()[name].requires for name in names))


def parse_request(
    extra_args: Mapping[str, Any] | None, bind: Callable[[str], str] = lambda named: named
) -> MemoryRequest:
    """Check the memory fields among an engine's extra arguments; fields of others pass untouched.

    bind: the tenant that a request speaks for, of the one that it names; raises RequestError.
    Raises RequestError naming the field and the fix: unknown ``mem_*`` fields, bad values, bad combinations.
    """
    said = extra_args or {}
    if CARRIER in said:
        raise RequestError(CARRIER, "is reserved for mem_triton's own use; remove it from the request")
    known = fields()
    for name in said:
        if isinstance(name, str) and name.startswith("mem_") and name not in known:
            raise RequestError(name, "unknown memory field." + nearest_name_hint(name[:64], known))
    tenant = bind(tenant_of(said))
    return MemoryRequest(tenant, {name: system.parse(said, tenant) for name, system in systems().items()})


def count_refusal(field: str) -> None:
    """Count a refused request. field: at fault; those that nobody knows count as one, clients invent them."""
    from mem_triton import metrics  # not with this module: SGLang says where counts are kept only later

    metrics.REFUSALS.labels(field if field in refusable() else "unknown").inc()


def refusable() -> frozenset[str]:
    """What a refused request may be at fault in: a closed set, as metrics need."""
    return frozenset({*fields(), CARRIER, "custom_params"})
