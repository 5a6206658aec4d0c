"""The cascade: fused attention over each row's own keys, then the shared segment for all rows at once (route
``shared_batched``). FlashInfer's cascade and Hydragen (arXiv 2402.05099), with the merge inside the second kernel."""

from __future__ import annotations

import torch

from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cascade import launch as cascade_launch
from mem_triton.ops.memory_attention.fused import launch


def attend(call: AttentionCall) -> None:
    """``memory_attention`` in two launches, of which the second reads the shared segment once for the whole batch.

    The call is already checked, its tensors are on a GPU. The sinks enter with the context. A row that
    does not see the shared segment has the bits of the first launch: those of a call without it. Other rows are rounded
    to the output's dtype twice. Without ``lse`` one is allocated, by shape.
    """
    if call.lse is None:
        call = call._replace(lse=torch.empty(call.query.shape[:2], dtype=torch.float32, device=call.query.device))
    launch.attend(call._replace(shared=None))
    cascade_launch.attend_shared(call)
