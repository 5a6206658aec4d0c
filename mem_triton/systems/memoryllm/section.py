"""MemoryLLM's configuration section."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mem_triton.schema import Section


class MemoryLLMSection(Section):
    """MemoryLLM: pools of hidden rows that texts are written into, and that requests read (arXiv 2402.04624).

    pools: the store that ``mem-triton convert memoryllm`` has made.
    default: the pool that a request reads which names none; None: it reads none.
    gib: device memory for keys and values of versions, taken before the KV cache is sized.
    versions: versions of one pool that running requests may read at once; a writer waits for one of them to end.
    chunk: tokens of a text that are written at once; the authors trained with 512.
    layers_per_step: layers that a write, or the loading of a version, runs between two steps; None: all at once.
    max_pools: pools that the store may have before requests can begin no more of them.
    """

    pools: Path
    default: str | None = "main"
    gib: float = Field(default=4.0, gt=0)
    versions: int = Field(default=3, ge=1)
    chunk: int = Field(default=512, ge=1)
    layers_per_step: int | None = Field(default=None, ge=1)
    max_pools: int = Field(default=64, ge=1)
