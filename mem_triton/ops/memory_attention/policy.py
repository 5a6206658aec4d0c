"""Which kernels a step's memory attention runs: decided on the host, from shapes and static tables alone.

Three routes give the same result:

* ``fused``: one kernel walks shared segment, memory pages and context of its row in one softmax. One launch.
* ``shared_batched``: the fused kernel for pages and context; then one kernel in which the queries of all rows meet the
  shared segment together, so that it is read once per batch and not once per row (Hydragen, arXiv 2402.05099). Two
  launches: worth it once the reading saved takes longer than a launch.
* ``stock_context``: the engine's own backend does the context and returns its log-sum-exp; ``memory_only.add_memory``
  merges the memories into it. For long queries where the engine has something like FlashAttention 3, which no Triton
  kernel matches in prefill. Only callers that hold such a backend can take it.

The batch-invariant way (``invariant.py``) is a fourth: nothing of it is chosen by the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mem_triton.ops.tuning.memory_attention import thresholds

Route = Literal["fused", "shared_batched", "stock_context"]


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
    max_query_len: int,
    shared_tokens: int,
    head_dim: int,
    stock_lse: bool = False,
) -> Policy:
    """The route for a step; depends on what a captured CUDA graph depends on, never on values on the device.

    architecture: "sm90", "gfx942", ... rows: of the batch, padding included. shared_tokens: of the shared segment, 0 =
    none. stock_lse: the caller has a backend that does the context and returns its log-sum-exp. Example::

        choose("sm90", rows=64, max_query_len=1, shared_tokens=12800, head_dim=128).route    # "shared_batched"
    """
    limits = thresholds(architecture)
    if stock_lse and max_query_len >= limits.stock_query_len:
        return Policy("stock_context")
    saved = (rows - 1) * shared_tokens * head_dim
    if shared_tokens >= limits.shared_tokens and saved >= limits.shared_saved:
        return Policy("shared_batched")
    return Policy("fused")
