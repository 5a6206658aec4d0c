"""The one configuration schema of mem_triton, whatever engine it runs in.

Example::

    {"delta": {"adapter": "declare-lab/delta-mem_qwen3_4b-instruct"}, "session_dir": "/var/lib/mem",
     "memory": {"bank": "/var/lib/bank", "pool_gib": 2, "retrieval": {"top_k": 5, "every": 64}}}
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mem_triton import ids as names

Scope = Literal["all", "sessions"]
"""Which requests δ-mem is for: all, or those that name a session."""
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeltaSection(_Section):
    """δ-mem, the online state.

    adapter: folder or Hugging Face id with ``delta_mem_config.json`` and the adapter's tensors.
    revision: branch, tag or commit of a Hugging Face id.
    tokens_per_state: KV-cache tokens that share one stored state; None chooses 16, or 1 under speculative decoding.
    scope: whose answers the adapter corrects: "all", or "sessions", those of requests that name a session; None: what
        the adapter was trained for, as its ``mem_triton.json`` says. A request overrides it with ``mem_read``.
    """

    adapter: str = Field(min_length=1)
    revision: str | None = None
    tokens_per_state: int | None = Field(default=None, ge=1, le=1024)
    scope: Scope | None = None


class RetrievalSection(_Section):
    """Memory³'s reading schedule (arXiv 2407.01178): references by the similarity of what is being said.

    top_k: references for each chunk. every: tokens of a chunk, of the prompt and of the answer alike.
    refresh: fetch anew while generating; False keeps the last prompt chunk's references to the end.
    min_score: references below this cosine similarity are left out.
    """

    top_k: int = Field(default=5, ge=1, le=64)
    every: int = Field(default=64, ge=1, le=4096)
    refresh: bool = True
    min_score: float | None = Field(default=None, ge=-1, le=1)


class MemorySection(_Section):
    """Explicit memory: a bank of texts written once as keys and values.

    bank: folder made by ``mem-triton write``. pool_gib: device memory for pages, taken before the KV cache is sized;
        host_gib: host memory that keeps what had to leave the device.
    pool_dtype: "auto" holds pages in the model's dtype; "int8" and "fp8" hold twice or four times as many.
    page_tokens: tokens of a page; None chooses 8 for Memory³'s sparse references and 16 for prefixes.
    default: ids attached to every request that names none. retrieval: off if absent; requests then name ids.
    capture: whether requests may keep what they say as entries (``mem_capture``): "off"; "own", in a namespace that
        ``mem-triton write`` does not use; "tenant", only those with a tenant, for that tenant alone.
    """

    bank: Path
    pool_gib: float = Field(default=1.0, gt=0)
    host_gib: float = Field(default=1.0, ge=0)
    pool_dtype: Literal["auto", "int8", "fp8"] = "auto"
    page_tokens: int | None = Field(default=None, ge=1, le=256)
    default: tuple[str, ...] = ()
    retrieval: RetrievalSection | None = None
    capture: Literal["off", "own", "tenant"] = "off"


class TenantsSection(_Section):
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


class MemTritonConfig(_Section):
    """The ``mem_triton`` section of an engine's configuration.

    delta: δ-mem, off if absent. memory: explicit memory, off if absent. tenants: what binds requests to tenants.
    session_dir: folder for committed session states; None keeps them in the server's memory only.
    deterministic: memory's own kernels give a row the same bits in any batch; ``docs/numerics.md`` says what is
        promised. The engine's own such mode turns this on, too; for whole answers both are needed.
    max_sessions: sessions kept in memory. With ``session_dir`` the least recently used one leaves memory and stays
        on disk; without it a new session beyond the limit is refused, because nothing may be lost silently.
    """

    delta: DeltaSection | None = None
    memory: MemorySection | None = None
    tenants: TenantsSection | None = None
    deterministic: bool = False
    session_dir: Path | None = None
    max_sessions: int = Field(default=4096, ge=1)


def parse_config(data: Mapping[str, Any]) -> MemTritonConfig:
    """Check a plain dict against the schema.

    Raises ConfigError naming every bad key, the nearest known key for unknown ones, and the expected type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"mem_triton must be a JSON object, got {type(data).__name__}")
    try:
        return MemTritonConfig.model_validate(dict(data))
    except ValidationError as error:
        sections = {
            (): MemTritonConfig,
            ("delta",): DeltaSection,
            ("memory",): MemorySection,
            ("memory", "retrieval"): RetrievalSection,
            ("tenants",): TenantsSection,
        }
        lines = []
        for item in error.errors():
            where = ".".join(("mem_triton", *map(str, item["loc"])))
            text = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                known = getattr(sections.get(tuple(item["loc"][:-1])), "model_fields", ())
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
