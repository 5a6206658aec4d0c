"""Chooses how ``memory_attention`` runs on a CPU: by numba, or by torch for what numba's kernels do not take."""

from __future__ import annotations

import numpy as np

from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cpu import paged_torch


def attend(call: AttentionCall) -> None:
    """Attend a call that is already checked. Who attends a row follows from the row alone."""
    # vLLM's start looks at all modules, and trips over numba's
    from mem_triton.ops.memory_attention.cpu import paged_numba

    context, slots = call.context, None if call.row_slot is None else call.row_slot.numpy()
    starts = context.query_start_loc.numpy()
    counts = starts[1:] - starts[:-1]
    if call.only_readers:
        counts = np.where(slots < 0, 0, counts)
    compiled, here = call, counts
    if not paged_numba.takes(call):
        compiled = call._replace(pages=None, table=None, shared=None)
        plain = np.ones(len(counts), bool) if slots is None else slots < 0
        here = np.where(plain & paged_numba.takes(compiled), counts, 0)
    if here.any():
        paged_numba.attend(compiled, here)
    if (here < counts).any():
        paged_torch.attend(call, skipped=here == counts)
