"""What pools have in common, what is known of one, and a version of it in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PoolShape:
    """What all pools of a store have in common.

    layers, rows, hidden: of a pool; tokens: rows that a write adds. dtype: "float32" or "bfloat16". per_layer: each
    layer drops rows of its own. bos: a learned row stands before the pool. embedding_first: a first write adds the
    positional embedding, too (the 7B branch of the authors' code does not).
    """

    layers: int
    rows: int
    hidden: int
    tokens: int
    dtype: str
    per_layer: bool = False
    bos: bool = True
    embedding_first: bool = True

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


@dataclass(frozen=True)
class PoolState:
    """A version in memory. rows: [L, N, d], None for version 0; link: the chain's hash at it."""

    version: int
    rows: Tensor | None
    generator: Tensor
    link: str
