"""When memory attention takes which route, and how its shared-segment and memory-only kernels are launched.

Derived from bytes, launch costs and the compiler's register counts (``benchmarks.kernels`` times the routes); not
measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mem_triton.ops.tuning import memory_attention_fused
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig


@dataclass(frozen=True)
class Thresholds:
    """Where ``policy.choose`` changes its route.

    shared_tokens: shortest shared segment worth a launch of its own. shared_saved: rows spared reading it, times its
    tokens, times the head size: 2**19 are some 4 us of reading 8 bf16 KV heads at 4.3 TB/s, two launches of a graph.
    """

    shared_tokens: int
    shared_saved: int


_THRESHOLDS = Thresholds(shared_tokens=256, shared_saved=1 << 19)
THRESHOLDS: dict[str, Thresholds] = {
    "sm80": _THRESHOLDS,
    "sm90": _THRESHOLDS,
    "sm100": _THRESHOLDS,
    "gfx942": _THRESHOLDS,
}


def thresholds(architecture: str) -> Thresholds:
    """Of an architecture such as "sm90"; any other one gets the common values."""
    return THRESHOLDS.get(architecture, _THRESHOLDS)


def select_shared(architecture: str, size: int, item_bytes: int, rows: int) -> FusedConfig:
    """Launch of the shared-segment kernel; rows: tokens of the batch, padding included, x query heads of a KV head.

    64 rows feed the widest matrix instruction of Hopper (wgmma), two programs a multiprocessor; 128 halve the reading
    where there are enough of them to fill the GPU.
    """
    config = memory_attention_fused.select(architecture, size, item_bytes, rows)
    amd, hopper = architecture.startswith("gfx"), architecture in ("sm90", "sm100")
    if item_bytes == 4:
        return _single(config)
    if config.block_m < 64:  # few rows: all reading, so more of it in flight
        return config if amd else replace(config, warps=4, stages=3)
    config = replace(config, stages=min(config.stages, 2))  # three of such tiles take more than half the shared memory
    if size > 128:
        return replace(config, block_m=32 if amd else 64, tile=32, warps=8)
    if not hopper:  # operands in registers: twice the warps
        return config if amd else replace(config, warps=8)
    return replace(config, block_m=128, warps=8) if rows >= 4096 else config


def select_pages(architecture: str, size: int, item_bytes: int, rows: int) -> FusedConfig:
    """Launch of the memory-only kernel; rows: longest query of the batch x query heads of a KV head.

    Short tiles: Memory³'s five references have 40 tokens a KV head, and 8-bit keys bring a scale for each channel.
    """
    config = memory_attention_fused.select(architecture, size, item_bytes, rows)
    if item_bytes == 4:
        return _single(config)
    block_m = min(config.block_m, 32 if size > 128 else 64)
    stages = 1 if architecture.startswith("gfx") else 3
    return replace(config, block_m=block_m, tile=16 if block_m == 16 else 32, warps=4, stages=stages)


def _single(config: FusedConfig) -> FusedConfig:
    """For fp32, whose products run without tensor cores: small tiles on many warps, for the registers."""
    return replace(config, block_m=min(config.block_m, 32), tile=16, warps=8, stages=1)
