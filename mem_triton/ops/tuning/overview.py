"""Which entry of which table each op gets on an architecture, for ``mem-triton doctor``."""

from __future__ import annotations

from typing import NamedTuple

from mem_triton.ops.tuning import MEASURED, delta_rule, memory_attention, memory_attention_fused


class TableUse(NamedTuple):
    """entry: "own", "generic" (the architecture has none) or "the same everywhere". measured: a result file or None."""

    op: str
    entry: str
    measured: str | None


_KEYS = {
    "delta_rule": set(delta_rule.TABLE),
    "memory_attention": set(memory_attention_fused._PROGRAMS),
    "memory_attention routes": set(memory_attention.THRESHOLDS),
    "memory_selection": None,
    "reposition": None,
}


def tables_for(architecture: str) -> list[TableUse]:
    """One row an op, for an architecture such as "sm90"."""
    return [
        TableUse(
            op,
            "the same everywhere" if keys is None else "own" if architecture in keys else "generic",
            MEASURED.get((op, architecture)),
        )
        for op, keys in _KEYS.items()
    ]
