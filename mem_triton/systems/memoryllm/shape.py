"""What pools have in common, and what is known of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class LongTermShape:
    """Sizes of M+'s long-term memory (arXiv 2502.00592, section 3.2).

    read: rows that a prompt reads in each layer. merge: dropped rows after which they join it. first: the frequency
    that they begin with; decay: what each merge takes off all. keys: width of the retriever's keys.
    """

    read: int
    merge: int
    first: float
    decay: float
    keys: int


@dataclass(frozen=True)
class PoolShape:
    """What all pools of a store have in common.

    layers, rows, hidden: of a pool; tokens: rows that a write adds. dtype: "float32" or "bfloat16". per_layer: each
    layer drops rows of its own. bos: a learned row stands before the pool. embedding_first: a first write adds the
    positional embedding, too (the 7B branch of the authors' code does not). long_term: of M+, None for MemoryLLM.
    """

    layers: int
    rows: int
    hidden: int
    tokens: int
    dtype: str
    per_layer: bool = False
    bos: bool = True
    embedding_first: bool = True
    long_term: LongTermShape | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """What ``asdict`` has made of one. Raises TypeError for other keys."""
        long = data.get("long_term")
        return cls(**{**data, "long_term": None if long is None else LongTermShape(**long)})

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class PoolInfo:
    """identity: never given twice, whatever pools are deleted. version: the newest; 0 if nothing was written yet."""

    name: str
    tenant: str
    identity: str
    version: int
    snapshots: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class PoolVersion:
    """One version, whatever is called so later. tenant: its owner's, "" of everybody's; identity: the pool's own."""

    tenant: str
    name: str
    identity: str
    version: int

    @property
    def id(self) -> str:
        """As requests name it."""
        return f"{self.name}@{self.version}"

    @property
    def ref(self) -> str:
        """As keys of caches and workers name it; no two versions have the same."""
        return f"{self.tenant}:{self.name}:{self.identity}@{self.version}"

    @classmethod
    def of(cls, ref: str) -> PoolVersion:
        """What ``ref`` names."""
        pool, _, version = ref.rpartition("@")
        return cls(*pool.split(":"), int(version))


def picks_ref(owner: str) -> str:
    """The long-term rows that one request reads, as its plan and its pages name them. owner: the request's own id."""
    return f"picks/{owner}"


def is_picks(ref: str) -> bool:
    """Whether a reference is of ``picks_ref``, and of no version."""
    return ref.startswith("picks/")
