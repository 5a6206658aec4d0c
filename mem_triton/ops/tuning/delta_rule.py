"""Launch configurations of the delta rule's kernels.

Chosen from register counts and the dependency chain (see ``ops/delta_rule/README.md``); not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DeltaRuleConfig:
    """How one rank runs on one architecture.

    max_recurrent: longest query that one launch of the recurrent kernel takes alone; longer ones go in chunks.
    rows, warps: state rows and warps of a program of the recurrent kernel.
    chunk: tokens per chunk. chunk_rows: state rows of one of the chunked scan's programs, a divisor of the rank.
    maps_warps: warps of a program that makes a chunk's map, which has chunk_rows * rank lanes.
    """

    max_recurrent: int
    rows: int
    warps: int
    chunk: int
    chunk_rows: int
    maps_warps: int


# A chunk map is r + 1 times a state, so larger ranks take longer chunks and fewer rows per program.
_BY_RANK = {
    4: DeltaRuleConfig(max_recurrent=64, rows=32, warps=1, chunk=64, chunk_rows=4, maps_warps=1),
    8: DeltaRuleConfig(max_recurrent=64, rows=16, warps=1, chunk=64, chunk_rows=8, maps_warps=2),
    16: DeltaRuleConfig(max_recurrent=128, rows=8, warps=1, chunk=128, chunk_rows=4, maps_warps=2),
    32: DeltaRuleConfig(max_recurrent=256, rows=8, warps=1, chunk=256, chunk_rows=2, maps_warps=2),
}
_WIDE_WARPS = {rank: replace(config, maps_warps=1) for rank, config in _BY_RANK.items()}  # 64 lanes a warp

TABLE: dict[str, dict[int, DeltaRuleConfig]] = {
    "sm80": _BY_RANK,
    "sm90": _BY_RANK,
    "sm100": _BY_RANK,
    "gfx942": _WIDE_WARPS,
}
GENERIC = _BY_RANK  # any other architecture: the kernels need nothing of a particular one


def select(architecture: str, rank: int) -> DeltaRuleConfig:
    """Configuration for a rank on an architecture such as "sm90" or "gfx942". ValueError for a rank without kernels."""
    table = TABLE.get(architecture, GENERIC)
    if rank not in table:
        raise ValueError(f"rank={rank}: the GPU kernels support ranks {sorted(table)}")
    return table[rank]
