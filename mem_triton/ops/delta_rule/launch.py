"""Launches the delta rule's kernels: grid, workspace and static configuration. Works on whatever the tensors lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.delta_rule.chunk_kernel_parts import PARTS
from mem_triton.ops.delta_rule.chunk_kernels import activate_kernel, chunk_maps_kernel, chunk_scan_kernel
from mem_triton.ops.delta_rule.kernels import recurrent_kernel
from mem_triton.ops.delta_rule.operands import Rule, batch_of, rule_of
from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
from mem_triton.ops.delta_rule.types import StateBatch
from mem_triton.ops.tuning.delta_rule import DeltaRuleConfig, select

# enable_fp_fusion is pinned: Triton is about to change its default, which would change the last bits.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
ACTIVATED = 64
"""Tokens of a program of ``activate_kernel``."""


def program_rows(config: DeltaRuleConfig, spec: DeltaRuleSpec) -> int:
    """State rows of a program of ``recurrent_kernel``."""
    return min(config.rows, 1 << (spec.read_width - 1).bit_length())


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
    """Advance all rows of a batch in place, in one launch for short queries and three for long ones.

    Arguments as in ``op.delta_rule_paged``. The grid depends on shapes and ``max_query_len`` alone.
    """
    config = config or select(architecture(projections.device), spec.rank)
    tokens, num_rows = projections.shape[0], batch.seq_lens.shape[0]
    if num_rows == 0 or tokens == 0:
        return
    rule, stride_table = rule_of(spec, block_size, tokens_per_state), batch.block_table.stride(0)
    if max_query_len > config.max_recurrent:
        _in_chunks(projections, reads, batch, spec, rule, stride_table, config)
        return
    rows = program_rows(config, spec)
    recurrent_kernel[(num_rows, -(-spec.read_width // rows))](
        projections=projections,
        reads=reads,
        batch=batch_of(batch),
        stride_token=projections.stride(0),
        stride_read=reads.stride(0),
        stride_table=stride_table,
        RULE=rule,
        ROWS=rows,
        num_warps=config.warps,
        **OPTIONS,
    )


def _in_chunks(
    projections: Tensor,
    reads: Tensor,
    batch: StateBatch,
    spec: DeltaRuleSpec,
    rule: Rule,
    stride_table: int,
    config: DeltaRuleConfig,
) -> None:
    tokens, num_rows = projections.shape[0], batch.seq_lens.shape[0]
    chunk, rank, heads = config.chunk, spec.rank, spec.heads
    # A chunk's walk loads one token ahead: so there is room for one more, which nobody fills.
    active = projections.new_empty(tokens + 1, heads, PARTS.value, rank, dtype=torch.float32)
    maps = projections.new_empty(tokens // chunk + 1, spec.state_size, rank + 1, dtype=torch.float32)
    activate_kernel[(-(-tokens // ACTIVATED), heads)](
        projections=projections,
        gate_bias=batch.gate_bias,
        active=active,
        num_tokens=tokens,
        stride_token=projections.stride(0),
        RULE=rule,
        TOKENS=ACTIVATED,
        num_warps=4,
        **OPTIONS,
    )
    grid = (tokens // chunk + num_rows, spec.read_width // config.chunk_rows)
    arguments = {
        "active": active,
        "batch": batch_of(batch),
        "maps": maps,
        "num_rows": num_rows,
        "stride_table": stride_table,
        "RULE": rule,
        "ROWS": config.chunk_rows,
        "CHUNK": chunk,
        **OPTIONS,
    }
    chunk_maps_kernel[grid](**arguments, num_warps=config.maps_warps)
    chunk_scan_kernel[grid](**arguments, reads=reads, stride_read=reads.stride(0), num_warps=1)
