"""When memory attention takes which route, and how its shared-segment and memory-only kernels are launched.

Derived from bytes, launch costs and the compiler's register counts (``benchmarks/kernels/memory_attention.py`` times
the routes); not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Where ``policy.choose`` changes its route.

    shared_tokens: shortest shared segment worth a launch of its own. shared_saved: rows spared reading it, times its
    tokens, times the head size: 2**19 are some 4 us of reading 8 bf16 KV heads at 4.3 TB/s, two launches of a graph.
    stock_query_len: longest query of a batch from which the engine's own prefill attention wins over a Triton kernel.
    """

    shared_tokens: int
    shared_saved: int
    stock_query_len: int


@dataclass(frozen=True)
class TileConfig:
    """Shape of one program: packed query rows, keys a step, warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


_THRESHOLDS = Thresholds(shared_tokens=256, shared_saved=1 << 19, stock_query_len=128)
THRESHOLDS: dict[str, Thresholds] = {
    "sm80": _THRESHOLDS,
    "sm90": _THRESHOLDS,
    "sm100": _THRESHOLDS,
    "gfx942": _THRESHOLDS,
}


def thresholds(architecture: str) -> Thresholds:
    """Of an architecture such as "sm90"; any other one gets the common values."""
    return THRESHOLDS.get(architecture, _THRESHOLDS)
