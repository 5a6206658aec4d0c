"""MemoryLLM's configuration section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mem_triton.schema import Section


class LongTermSection(Section):
    """M+'s long-term rows (arXiv 2502.00592); of stores that ``mem-triton convert mplus`` has made.

    device_keys: the retriever's keys lie on the device; false: on the host.
    tier: where keys and values of long-term rows lie, "host" or "device".
    selection: "whole": a prompt chooses with all its tokens, as the authors' code does, so it goes through the model in
        one step. "chunk": each part of a split prompt chooses for itself, which is not the authors'.
    """

    device_keys: bool = True
    tier: Literal["host", "device"] = "host"
    selection: Literal["whole", "chunk"] = "whole"


class MemoryLLMSection(Section):
    """MemoryLLM: pools of hidden rows that texts are written into, and that requests read (arXiv 2402.04624).

    pools: the store that ``mem-triton convert memoryllm`` or ``mplus`` has made.
    default: the pool that a request reads which names none; None: it reads none.
    gib: device memory for keys and values of versions, taken before the KV cache is sized.
    host_gib: host memory of each worker for the newest versions of pools that were read, the least recent go first;
        what is in it comes back to the device without the model. One always stays.
    versions: versions of one pool that running requests may read at once; a writer waits for one of them to end.
    chunk: tokens of a text that are written at once; the authors trained with 512.
    layers_per_step: layers that a write, or the loading of a version, runs between two steps; None: all at once.
    max_pools: pools that the store may have before requests can begin no more of them.
    ltm: long-term rows, of a store of M+.
    """

    pools: Path
    default: str | None = "main"
    gib: float = Field(default=4.0, gt=0)
    host_gib: float = Field(default=4.0, ge=0)
    versions: int = Field(default=3, ge=1)
    chunk: int = Field(default=512, ge=1)
    layers_per_step: int | None = Field(default=None, ge=1)
    max_pools: int = Field(default=64, ge=1)
    ltm: LongTermSection = LongTermSection()
