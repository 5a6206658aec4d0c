"""``memory_attention`` on a CPU: rows of few queries by numba, all others by torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import PagedContext
from mem_triton.ops.memory_attention.cpu import paged_torch


def attend(
    query: Tensor,
    context: PagedContext,
    out: Tensor,
    *,
    row_slot: Tensor | None,
    only_readers: bool = False,
    **options: Any,
) -> None:
    """Arguments as in ``op.memory_attention``, already checked. Who attends a row follows from the row alone."""
    from mem_triton.ops.memory_attention.cpu import (
        paged_numba,  # vLLM's start looks at all modules, and trips over numba's
    )

    starts = context.query_start_loc.numpy()
    counts = starts[1:] - starts[:-1]
    if only_readers:
        counts = np.where(row_slot.numpy() < 0, 0, counts)
    short = (counts > 0) & (counts <= paged_numba.SHORT) & paged_numba.takes(context, query, None, None)
    memory = {name: options[name] for name in ("pages", "table", "shared")}
    if not paged_numba.takes(context, query, memory["pages"], memory["shared"]):
        if row_slot is not None:
            short &= row_slot.numpy() < 0
        memory = dict.fromkeys(memory)
    if short.any():
        compiled = {**options, **memory}
        paged_numba.attend(query, context, out, np.flatnonzero(short), row_slot=row_slot, **compiled)
    rest = counts * ~short
    if rest.any():
        paged_torch.attend(query, context, out, row_slot=row_slot, skipped=rest == 0, **options)
