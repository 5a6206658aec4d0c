"""Which kernels a step's memory attention runs: decided on the host, from shapes and static tables alone.

Two routes give the same result:

* ``fused``: one kernel walks shared segment, memory pages and context of its row in one softmax. One launch.
* ``shared_batched``: the fused kernel for pages and context; then one kernel in which the queries of all rows meet the
  shared segment together, so that it is read once per batch and not once per row (Hydragen, arXiv 2402.05099). Two
  launches: worth it once the reading saved takes longer than a launch.

Callers that hold a backend which does the context and returns its log-sum-exp (FlashAttention) take neither: they have
``cascade.memory_only.add_memory`` merge the memories into its result. The batch-invariant way (``invariant.py``) is
another: nothing of it is chosen by the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.tuning.memory_attention import thresholds

Route = Literal["fused", "shared_batched"]


@dataclass(frozen=True)
class Policy:
    """How one call runs. ``Policy("fused")`` forces a route; ``choose`` picks one.

    batch_invariant: a row's bits do not depend on the other rows; only ``fused`` can.
    """

    route: Route = "fused"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.route not in get_args(Route):
            raise ValueError(f"route={self.route!r}: expected one of {', '.join(get_args(Route))}")
        if self.batch_invariant and self.route != "fused":
            raise ValueError(f'route={self.route!r}: only "fused" can be batch-invariant')


def choose(
    architecture: str,
    *,
    rows: int,
    shared_tokens: int,
    head_dim: int,
) -> Policy:
    """The route for a step; depends on what a captured CUDA graph depends on, never on values on the device.

    architecture: "sm90", "gfx942", ... rows: of the batch, padding included. shared_tokens: of the shared segment, 0 =
    none. Example::

        choose("sm90", rows=64, shared_tokens=12800, head_dim=128).route    # "shared_batched"
    """
    limits = thresholds(architecture)
    saved = (rows - 1) * shared_tokens * head_dim
    if shared_tokens >= limits.shared_tokens and saved >= limits.shared_saved:
        return Policy("shared_batched")
    return Policy("fused")


def choose_for(architecture: str, call: AttentionCall) -> Policy:
    """``choose`` for the shapes of a call."""
    return choose(
        architecture,
        rows=len(call.context.seq_lens),
        shared_tokens=0 if call.shared is None else call.shared.keys.shape[1],
        head_dim=call.query.shape[2],
    )
