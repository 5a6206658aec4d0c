"""Launch configurations of the fused attention kernel (``ops/memory_attention/fused/kernels.py``).

Chosen from registers, shared memory and occupancy (see the ahead-of-time tests); not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FusedConfig:
    """How one batch shape runs on one architecture.

    block_m: rows of a program, query tokens x query heads of a KV head; at least 16. tile: keys of the context a step.
    warps, stages: of a program. programs: a launch with fewer programs splits the keys until it has about so many.
    min_tiles: a split has at least so many tiles. max_splits: most splits of one block of queries.
    merge_memory: bytes of shared memory for splits on their way to the one that merges them; 0 on AMD, whose copies
    would take registers instead.
    memory_tile, quantised_tile: keys of memory a step, the second one if any is 8-bit. No other field may depend on
    memory: a row without memory is computed as if there were none.
    """

    block_m: int
    tile: int
    warps: int
    stages: int
    programs: int = 264
    min_tiles: int = 4
    max_splits: int = 32
    memory_tile: int = 32
    quantised_tile: int = 16
    merge_memory: int = 48 << 10

    def holding(self, group: int) -> FusedConfig:
        """The same with at least ``group`` rows, which no program may part: the query heads of a KV head."""
        return self if self.block_m >= group else replace(self, block_m=1 << (group - 1).bit_length())

    def merge_stages(self, size: int) -> int:
        """Stages of the loop that merges splits of heads of ``size`` channels: one, and one for each buffer, of which a
        single one would not help."""
        buffers = min(3, self.merge_memory // (self.block_m * size * 4))
        return 1 + buffers if buffers > 1 else 1


_PROGRAMS = {"sm80": 216, "sm90": 264, "sm100": 296, "gfx942": 304}  # twice the multiprocessors, once on AMD
GENERIC_PROGRAMS = 216


def select(architecture: str, size: int, item_bytes: int, rows: int) -> FusedConfig:
    """Configuration for heads of ``size`` channels in elements of ``item_bytes``, ``rows`` = longest query x group.

    Everything here is known on the host before a step, so that a captured graph and an eager call run the same.
    """
    programs = _PROGRAMS.get(architecture, GENERIC_PROGRAMS)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 64)
    if item_bytes == 4:  # fp32 dots have no tensor cores to feed: small tiles, for the registers
        block_m, tile = min(block_m, 32), 16
        config = FusedConfig(block_m, tile, 8 if size > 128 else 4, 1, programs, memory_tile=16)
        return replace(config, merge_memory=0) if architecture.startswith("gfx") else config
    wide = size > 128
    if architecture.startswith("gfx"):  # 64 threads a warp
        return FusedConfig(block_m, 32 if wide else 64, 4, 1, programs, merge_memory=0)
    if block_m == 64 and architecture not in ("sm90", "sm100"):  # without wgmma the accumulator fills the registers
        return FusedConfig(block_m, 32, 8, 2 if wide else 3, programs, memory_tile=16 if wide else 32)
    small = wide or (block_m < 64 and size & (size - 1))  # few rows leave a rest of 16 channels in every warp
    # Three stages: with two, a tile's keys and values are waited for as soon as they are asked for.
    return FusedConfig(block_m, 32 if small else 64, 8 if wide else 4, 3, programs)
