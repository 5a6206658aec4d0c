"""The one configuration schema of mem_triton, whatever engine it runs in.

Example::

    {"delta": {"adapter": "declare-lab/delta-mem_qwen3_4b-instruct"}, "session_dir": "/var/lib/mem",
     "memory": {"bank": "/var/lib/bank", "pool_gib": 2, "retrieval": {"top_k": 5, "every": 64}}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, create_model

from mem_triton.schema import ConfigError, General, TenantsSection, nearest_name_hint
from mem_triton.systems import registry

__all__ = ["ConfigError", "MemTritonConfig", "TenantsSection", "load_config", "nearest_name_hint", "parse_config"]


class _WithSystems(General):
    @property
    def systems(self) -> tuple[str, ...]:
        """The memory systems that are configured, in the registry's order."""
        return tuple(name for name in registry.systems() if self.section(name) is not None)


MemTritonConfig = create_model(
    "MemTritonConfig",
    __base__=_WithSystems,
    __doc__=General.__doc__,
    __module__=__name__,
    **{name: (system.Config | None, None) for name, system in registry.systems().items()},
)
"""``General`` with a section for each memory system of the registry, None where it is off."""


def _section_at(path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The schema of a section by its place in the configuration; None for a place that has none."""
    section: Any = MemTritonConfig
    for name in path:
        found = section.model_fields.get(name) if section is not None else None
        kinds = (found.annotation, *get_args(found.annotation)) if found is not None else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return section


def parse_config(data: Mapping[str, Any]) -> MemTritonConfig:
    """Check a plain dict against the schema.

    Raises ConfigError naming every bad key, the nearest known key for unknown ones, and the expected type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"mem_triton must be a JSON object, got {type(data).__name__}")
    try:
        return MemTritonConfig.model_validate(dict(data))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(("mem_triton", *map(str, item["loc"])))
            text = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                known = getattr(_section_at(item["loc"][:-1]), "model_fields", ())
                text = "unknown key." + nearest_name_hint(str(item["loc"][-1]), known)
            lines.append(f"{where}: {text}")
        raise ConfigError("bad mem_triton configuration: " + "; ".join(lines)) from None


def load_config(path: str | os.PathLike[str]) -> MemTritonConfig:
    """Read a YAML or JSON file that holds the section itself, or the section under the key ``mem_triton``.

    Raises ConfigError naming the file and what is wrong with it.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, Mapping) and set(data) == {"mem_triton"}:
        data = data["mem_triton"]
    try:
        return parse_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
