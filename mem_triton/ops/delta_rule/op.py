"""``mem_triton::delta_rule_paged``: the delta rule over a paged state cache, as one torch.library op.

The op checks its tensors, then runs compiled loops on a CPU (``paged_numba``) or Triton kernels on a GPU (``launch``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.common.checks import FLOATS, check_tensor
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch

_SCHEMA = """delta_rule_paged(
    Tensor projections, Tensor(a!) reads, Tensor gate_bias, Tensor(b!) state_cache, Tensor block_table,
    Tensor query_start_loc, Tensor seq_lens, Tensor? initial_states, Tensor? initial_slot, Tensor? write_enabled,
    Tensor(c!)? last_states, *, int rank, int heads, bool rankwise_gates, bool couple_lambda, str update_mode,
    bool normalize_qk, int block_size, int tokens_per_state, int max_query_len, bool batch_invariant=False) -> ()"""


def delta_rule_paged(
    projections: Tensor,
    reads: Tensor,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    *,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
    batch_invariant: bool = False,
) -> None:
    """Read and update the states of a varlen batch, in place (δ-mem, arXiv 2605.12357, section 3).

    projections: [T, P] fp32, bf16 or fp16, laid out q | k | v | beta [| lambda]; T may exceed the batch's tokens.
    reads: fp32 [>= T, H*r], written for every token of a row, before its own write.
    block_size: tokens of a block of ``batch``, a multiple of tokens_per_state, the tokens of a state's cell.
    max_query_len: at least the longest row's tokens in this step, a host integer (it picks the kernels).
    batch_invariant: a row's bits depend neither on the other rows nor on how its tokens come in steps: on a GPU, too,
    it is walked token by token then, however long.

    Example::

        delta_rule_paged(hidden @ adapter.down.T, reads, StateBatch(gate_bias, cache, block_table, starts, lengths),
                         spec, block_size=16, tokens_per_state=16, max_query_len=1)

    No host sync and no data-dependent shape on a GPU. ValueError names the tensor that does not fit.
    """
    # The op boundary is for tracers (torch.compile, fake tensors); without one it would only cost 40 us a layer.
    if not torch.compiler.is_compiling() and type(projections) is Tensor:
        return _run(projections, reads, batch, spec, block_size, tokens_per_state, max_query_len, batch_invariant)
    return torch.ops.mem_triton.delta_rule_paged(
        projections,
        reads,
        *batch,
        rank=spec.rank,
        heads=spec.heads,
        rankwise_gates=spec.rankwise_gates,
        couple_lambda=spec.couple_lambda,
        update_mode=spec.update_mode,
        normalize_qk=spec.normalize_qk,
        block_size=block_size,
        tokens_per_state=tokens_per_state,
        max_query_len=max_query_len,
        batch_invariant=batch_invariant,
    )


def _traced(
    projections,
    reads,
    *batch,
    rank,
    heads,
    rankwise_gates,
    couple_lambda,
    update_mode,
    normalize_qk,
    block_size,
    tokens_per_state,
    max_query_len,
    batch_invariant=False,
):
    spec = DeltaRuleSpec(rank, heads, rankwise_gates, couple_lambda, update_mode, normalize_qk)
    layout = (block_size, tokens_per_state, max_query_len, batch_invariant)
    _run(projections, reads, StateBatch(*batch), spec, *layout)


def _run(projections, reads, batch, spec, block_size, tokens_per_state, max_query_len, batch_invariant):
    check(projections, reads, batch, spec, block_size, tokens_per_state)
    if batch_invariant:
        max_query_len = 1  # as if no row were long enough for chunks
    if projections.device.type == "cpu":
        from mem_triton.ops.delta_rule import paged_numba as path  # numba takes half a second to import
    else:
        from mem_triton.ops.delta_rule import launch as path  # Triton is there on Linux only

    path.step_rows(projections, reads, batch, spec, block_size, tokens_per_state, max_query_len)


def check(
    projections: Tensor, reads: Tensor, batch: StateBatch, spec: DeltaRuleSpec, block_size: int, tokens_per_state: int
) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype or layout the op cannot take."""
    rows, size = batch.seq_lens.shape[0], spec.state_size
    if block_size % tokens_per_state:
        raise ValueError(f"block_size={block_size} must be a multiple of tokens_per_state={tokens_per_state}")
    if projections.dtype not in FLOATS:
        raise ValueError(f"projections: dtype {projections.dtype}, expected float32, bfloat16 or float16")
    if reads.shape[0] < projections.shape[0]:
        raise ValueError(f"reads: {reads.shape[0]} rows for {projections.shape[0]} tokens of projections")
    int32, fp32 = (torch.int32,), (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("projections", projections, (None, spec.projection_width), FLOATS),
        ("gate_bias", batch.gate_bias, (spec.bias_width,), fp32),
        ("reads", reads, (None, spec.read_width), fp32),
        ("state_cache", batch.state_cache, (None, block_size // tokens_per_state, size), fp32),
        ("block_table", batch.block_table, (rows, None), int32),
        ("query_start_loc", batch.query_start_loc, (rows + 1,), int32),
        ("seq_lens", batch.seq_lens, (rows,), int32),
        ("initial_states", batch.initial_states, (None, size), fp32),
        ("initial_slot", batch.initial_slot, (rows,), int32),
        ("write_enabled", batch.write_enabled, (rows,), int32),
        ("last_states", batch.last_states, (None, 2, size), fp32),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, ("projections", projections))
    for name, tensor in (("initial_states", batch.initial_states), ("last_states", batch.last_states)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, its strides are {tensor.stride()}")
    if batch.initial_slot is None and (batch.initial_states is not None or batch.last_states is not None):
        raise ValueError("initial_slot: needed to place initial_states or last_states")


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("delta_rule_paged", _traced, _device)
torch.library.register_fake("mem_triton::delta_rule_paged", lambda *args, **kwargs: None, lib=_LIBRARY)
