"""Launches the delta rule's kernels: grid, workspace and static configuration. Works on whatever the tensors lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.delta_rule.kernels import chunk_maps_kernel, recurrent_kernel
from mem_triton.ops.delta_rule.operands import batch_of, rule_of
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig, select

# enable_fp_fusion is pinned: Triton is about to change its default, which would change the last bits.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def program_shape(config: DeltaRuleConfig, spec: DeltaRuleSpec, chunked: bool) -> tuple[int, int]:
    """State rows and warps of one program."""
    rows, warps = (config.chunk_rows, config.chunk_warps) if chunked else (config.rows, config.warps)
    return min(rows, 1 << (spec.read_width - 1).bit_length()), warps


def step_rows(
    projections: Tensor,
    reads: Tensor,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    block_size: int,
    tokens_per_state: int,
    max_query_len: int,
    config: DeltaRuleConfig | None = None,
) -> None:
    """Advance all rows of a batch in place, in one launch for short queries and two for long ones.

    Arguments as in ``op.delta_rule_paged``. The grid depends on shapes and ``max_query_len`` alone.
    """
    config = config or select(architecture(projections.device), spec.rank)
    tokens, num_rows = projections.shape[0], batch.seq_lens.shape[0]
    if num_rows == 0 or tokens == 0:
        return
    chunk = config.chunk if max_query_len > config.max_recurrent else 0
    rows, warps = program_shape(config, spec, chunked=chunk > 0)
    slots = tokens // chunk + num_rows if chunk else num_rows
    maps = None
    if chunk:
        maps = projections.new_empty(tokens // chunk + 1, spec.state_size, spec.rank + 1, dtype=torch.float32)
    grid = (slots, -(-spec.read_width // rows))
    arguments = {
        "projections": projections,
        "batch": batch_of(batch),
        "maps": maps,
        "num_rows": num_rows,
        "stride_token": projections.stride(0),
        "stride_table": batch.block_table.stride(0),
        "RULE": rule_of(spec, block_size, tokens_per_state),
        "ROWS": rows,
        "CHUNK": chunk,
        "num_warps": warps,
        **OPTIONS,
    }
    if chunk:
        chunk_maps_kernel[grid](**arguments)
    recurrent_kernel[grid](reads=reads, stride_read=reads.stride(0), **arguments)
