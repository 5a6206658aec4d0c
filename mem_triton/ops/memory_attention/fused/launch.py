"""Launches the fused attention kernel: grid, splits, workspace. Works on whatever the tensors lie on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mem_triton.ops import denylist
from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.common.constants import constants
from mem_triton.ops.common.kept import kept
from mem_triton.ops.memory_attention.arguments.types import AttentionCall, PagedContext
from mem_triton.ops.memory_attention.fused.kernels import attention_kernel
from mem_triton.ops.memory_attention.fused.operands import (
    Splits,
    channel_parts,
    context_of,
    head_of,
    is_quantised,
    logits_of,
    output_of,
    pages_of,
    queries_of,
    segment_of,
    table_of,
)
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig, select

COLUMNS = 256
"""Columns of a table that a program looks through at a time."""
# enable_fp_fusion is pinned: Triton is about to change its default, which would change the last bits.
OPTIONS = {"enable_fp_fusion": True}


class Grid(NamedTuple):
    """Programs of a launch; a function of shapes alone."""

    blocks: int
    heads: int
    splits: int
    one_block: bool  # block n holds all queries of row n
    part: int = 0  # which rows: see ``kernel_parts.asked``


class Launch(NamedTuple):
    """Compile-time numbers of a launch, from its configuration and its grid."""

    BLOCK_M: Any
    TILE: Any
    MEMORY_TILE: Any
    COLUMNS: Any
    ONE_BLOCK: Any
    SPLIT: Any
    MIN_TILES: Any
    PART: Any
    MERGE_STAGES: Any


def choose_grid(tokens: int, rows: int, heads: int, group: int, context: PagedContext, config: FusedConfig) -> Grid:
    """Blocks for any batch of these shapes, and splits where they are few.

    They do not depend on memory, which may not change the bits of rows without it.
    """
    per_block = config.block_m // group
    one_block = context.max_query_len <= per_block
    blocks = rows if one_block else tokens // per_block + rows
    longest = context.block_table.shape[1] * context.keys.shape[2]
    splits = min(
        config.programs // max(1, blocks * heads), config.max_splits, -(-longest // (config.tile * config.min_tiles))
    )
    return Grid(blocks, heads, max(1, splits), one_block)


def workspace_for(device: torch.device, config: FusedConfig, size: int) -> Splits:
    """The workspace of a configuration on the current stream; it holds the largest grid that splits."""
    cells, floats = config.programs, config.block_m * (sum(channel_parts(size)) + 4)

    def make() -> Splits:
        partial = torch.empty(cells * floats, dtype=torch.float32, device=device)
        return Splits(partial, torch.zeros(cells, dtype=torch.int32, device=device))

    return kept(device, ("memory_attention", cells, floats), make)


def attend(call: AttentionCall, config: FusedConfig | None = None, workspace: Splits | None = None) -> None:
    """Attend the whole batch of a checked call in one launch."""
    query, context = call.query, call.context
    tokens, query_heads, size = query.shape
    rows, heads = context.seq_lens.shape[0], context.keys.shape[1]
    if tokens == 0 or rows == 0:
        return
    group = query_heads // heads
    if config is None:
        key = architecture(query.device), size, query.element_size(), group * context.max_query_len, group
        config = denylist.allowed("attention", select, *key)
    config = config.holding(group)
    grid = choose_grid(tokens, rows, heads, group, context, config)
    grid = grid._replace(part=3) if call.only_readers else grid
    if grid.splits > 1:
        workspace = workspace or workspace_for(query.device, config, size)
    run(call, config, grid, workspace)


def run(call: AttentionCall, config: FusedConfig, grid: Grid, workspace: Splits | None) -> None:
    """One launch of a grid."""
    arguments = kernel_arguments(call, config, grid, workspace)
    attention_kernel[grid[:3]](**arguments, num_warps=config.warps, num_stages=config.stages, **OPTIONS)


def kernel_arguments(call: AttentionCall, config: FusedConfig, grid: Grid, workspace: Splits | None) -> dict[str, Any]:
    """The kernel's arguments by name."""
    context, shared, size = call.context, call.shared, call.query.shape[2]
    quantised = is_quantised(call.pages) or is_quantised(shared)
    launch = constants(
        Launch,
        config.block_m,
        config.tile,
        config.quantised_tile if quantised else config.memory_tile,
        1 if call.table is None else min(COLUMNS, 1 << (call.table.page.shape[1] - 1).bit_length()),
        grid.one_block,
        grid.splits > 1,
        config.min_tiles,
        grid.part,
        config.merge_stages(size),
    )
    return {
        "query": queries_of(call),
        "output": output_of(call, call.sinks),
        "context": context_of(call),
        "pages": pages_of(call),
        "table": table_of(call),
        "shared": segment_of(call, None if shared is None else shared.keys.shape[1]),
        "splits": workspace,
        "logits": logits_of(call),
        "num_rows": context.seq_lens.shape[0],
        "stride_lse": 0 if call.lse is None else call.lse.stride(0),
        "stride_block_table": context.block_table.stride(0),
        "HEAD": head_of(size, call.query.shape[1] // context.keys.shape[1]),
        "LAUNCH": launch,
    }
