"""``memory_attention`` on a CPU: rows of few queries by numba, all others by torch."""

from __future__ import annotations

import numpy as np

from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cpu import paged_torch


def attend(call: AttentionCall) -> None:
    """Attend a call that is already checked. Who attends a row follows from the row alone."""
    # vLLM's start looks at all modules, and trips over numba's
    from mem_triton.ops.memory_attention.cpu import paged_numba

    query, context, row_slot = call.query, call.context, call.row_slot
    starts = context.query_start_loc.numpy()
    counts = starts[1:] - starts[:-1]
    if call.only_readers:
        counts = np.where(row_slot.numpy() < 0, 0, counts)
    short = (counts > 0) & (counts <= paged_numba.SHORT) & paged_numba.takes(context, query, None, None)
    compiled = call
    if not paged_numba.takes(context, query, call.pages, call.shared):
        if row_slot is not None:
            short &= row_slot.numpy() < 0
        compiled = call._replace(pages=None, table=None, shared=None)
    if short.any():
        paged_numba.attend(compiled, np.flatnonzero(short))
    rest = counts * ~short
    if rest.any():
        paged_torch.attend(call, skipped=rest == 0)
