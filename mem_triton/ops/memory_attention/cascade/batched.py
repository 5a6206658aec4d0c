"""The cascade: fused attention over each row's own keys, then the shared segment for all rows at once (route
``shared_batched``). FlashInfer's cascade and Hydragen (arXiv 2402.05099), with the merge inside the second kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, PagedContext, SharedSegment
from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
from mem_triton.ops.memory_attention.fused import launch


def attend(
    query: Tensor,
    context: PagedContext,
    out: Tensor,
    *,
    scale: float,
    row_slot: Tensor,
    shared: SharedSegment,
    pages: MemoryPages | None = None,
    table: MemoryTable | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    only_readers: bool = False,
) -> None:
    """``memory_attention`` in two launches, of which the second reads the shared segment once for the whole batch.

    Arguments as in ``op.memory_attention``, already checked, on a GPU. The sinks enter with the context. A row that
    does not see the shared segment has the bits of the first launch: those of a call without it. Other rows are rounded
    to the output's dtype twice. Without ``lse`` one is allocated, by shape.
    """
    if lse is None:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    launch.attend(
        query,
        context,
        out,
        scale=scale,
        row_slot=row_slot,
        pages=pages,
        table=table,
        soft_cap=soft_cap,
        sinks=sinks,
        lse=lse,
        only_readers=only_readers,
    )
    cascade_launch.attend_shared(
        query,
        context.query_start_loc,
        context.seq_lens,
        out,
        lse,
        scale=scale,
        row_slot=row_slot,
        shared=shared,
        soft_cap=soft_cap,
    )
