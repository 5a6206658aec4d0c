"""Launches the fused attention kernel: grid, splits, workspace. Works on whatever the tensors lie on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem_triton.ops import denylist
from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.common.kept import kept
from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, PagedContext, SharedSegment
from mem_triton.ops.memory_attention.fused.kernels import attention_kernel
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig, select

COLUMNS = 256
"""Columns of a table that a program looks through at a time."""
FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}
# enable_fp_fusion is pinned: Triton is about to change its default, which would change the last bits.
OPTIONS = {"enable_fp_fusion": True}


class Workspace(NamedTuple):
    """What splits of a block of queries leave for the last of them. One launch at a time may use it."""

    partial: Tensor  # fp32 [cells * BLOCK_M * (padded D + 4)]
    counter: Tensor  # int32 [blocks * heads], zeros before and after every launch


class Grid(NamedTuple):
    """Programs of a launch; a function of shapes alone."""

    blocks: int
    heads: int
    splits: int
    one_block: bool  # block n holds all queries of row n
    part: int = 0  # which rows: see ``kernel_parts.asked``


def channel_parts(size: int) -> tuple[int, int]:
    """A head's channels as a power of two and the rest, at least 16: 80 = 64 + 16, 128 = 128 + 0."""
    width = 1 << (size.bit_length() - 1)
    rest = size - width
    return width, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def choose_grid(tokens: int, rows: int, heads: int, group: int, context: PagedContext, config: FusedConfig) -> Grid:
    """Blocks for any batch of these shapes, and splits where they are few. Memory has no say: it may not move bits."""
    per_block = config.block_m // group
    one_block = context.max_query_len <= per_block
    blocks = rows if one_block else tokens // per_block + rows
    longest = context.block_table.shape[1] * context.keys.shape[2]
    splits = min(
        config.programs // max(1, blocks * heads), config.max_splits, -(-longest // (config.tile * config.min_tiles))
    )
    return Grid(blocks, heads, max(1, splits), one_block)


def workspace_for(device: torch.device, config: FusedConfig, size: int) -> Workspace:
    """The workspace of a configuration on the current stream; it holds the largest grid that splits."""
    cells, floats = config.programs, config.block_m * (sum(channel_parts(size)) + 4)

    def make() -> Workspace:
        partial = torch.empty(cells * floats, dtype=torch.float32, device=device)
        return Workspace(partial, torch.zeros(cells, dtype=torch.int32, device=device))

    return kept(device, ("memory_attention", cells, floats), make)


def attend(
    query: Tensor,
    context: PagedContext,
    out: Tensor,
    *,
    scale: float,
    row_slot: Tensor | None = None,
    pages: MemoryPages | None = None,
    table: MemoryTable | None = None,
    shared: SharedSegment | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    only_readers: bool = False,
    config: FusedConfig | None = None,
    workspace: Workspace | None = None,
) -> None:
    """The whole batch in one launch. Arguments as in ``op.memory_attention``, already checked."""
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
    grid = grid._replace(part=3) if only_readers else grid
    if grid.splits > 1:
        workspace = workspace or workspace_for(query.device, config, size)
    run(
        query, context, out, scale=scale, row_slot=row_slot, pages=pages, table=table, shared=shared,
        soft_cap=soft_cap, sinks=sinks, lse=lse, config=config, grid=grid, workspace=workspace,
    )  # fmt: skip


def run(query: Tensor, context: PagedContext, out: Tensor, *, config: FusedConfig, grid: Grid, **options: Any) -> None:
    """One launch of a grid. options: the other arguments of ``kernel_arguments``."""
    arguments, constants = kernel_arguments(query, context, out, config=config, grid=grid, **options)
    attention_kernel[grid[:3]](
        **arguments, **constants, num_warps=config.warps, num_stages=config.stages, **OPTIONS
    )  # fmt: skip


def kernel_arguments(
    query: Tensor, context: PagedContext, out: Tensor, *, scale: float, row_slot: Tensor | None,
    pages: MemoryPages | None, table: MemoryTable | None, shared: SharedSegment | None, soft_cap: float,
    sinks: Tensor | None, lse: Tensor | None, config: FusedConfig, grid: Grid, workspace: Workspace | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The kernel's runtime and compile-time arguments by name."""
    page_keys, page_values, page_key_scale, page_value_scale = pages or (None,) * 4
    page, page_tokens, first, end, count, bias = table or (None,) * 6
    segment = shared or (None,) * 7
    raw = lambda x: x.view(torch.uint8) if x is not None and x.dtype == torch.float8_e4m3fn else x  # noqa: E731
    strides = lambda x, n: x.stride()[:n] if x is not None else (0,) * n  # noqa: E731
    width, rest = channel_parts(query.shape[2])
    arguments = {
        "query": query, "out": out, "lse": lse, "keys": context.keys, "values": context.values,
        "block_table": context.block_table, "query_start_loc": context.query_start_loc, "seq_lens": context.seq_lens,
        "row_slot": row_slot, "page_keys": raw(page_keys), "page_values": raw(page_values),
        "page_key_scale": page_key_scale, "page_value_scale": page_value_scale,
        "table_page": page, "table_tokens": page_tokens, "table_first": first, "table_end": end,
        "table_count": count, "table_bias": bias, "shared_keys": raw(segment[0]), "shared_values": raw(segment[1]),
        "shared_first": segment[2], "shared_end": segment[3], "shared_key_scale": segment[4],
        "shared_value_scale": segment[5], "sinks": sinks,
        "partial": workspace.partial if workspace else None, "counter": workspace.counter if workspace else None,
        "num_rows": context.seq_lens.shape[0], "scale": scale, "soft_cap": soft_cap,
        "shared_bias": float(segment[6] or 0.0), "shared_tokens": segment[0].shape[1] if shared else 0,
        **dict(zip(("stride_query", "stride_query_head"), query.stride(), strict=False)),
        **dict(zip(("stride_out", "stride_out_head"), out.stride(), strict=False)),
        "stride_lse": lse.stride(0) if lse is not None else 0,
        **dict(zip(("stride_block", "stride_head", "stride_token"), context.keys.stride(), strict=False)),
        "stride_block_table": context.block_table.stride(0),
        **dict(zip(("stride_page", "stride_page_head", "stride_page_token"), strides(page_keys, 3), strict=True)),
        "stride_table": strides(page, 1)[0],
        **dict(zip(("stride_shared_head", "stride_shared_token"), strides(segment[0], 2), strict=True)),
    }  # fmt: skip
    formats = [FORMATS.get(x.dtype, 0) if x is not None else 0 for x in (page_keys, segment[0])]
    memory_tile = config.quantised_tile if any(formats) else config.memory_tile
    constants = {
        "GROUP": query.shape[1] // context.keys.shape[1], "SIZE": query.shape[2], "WIDTH": width, "REST": rest,
        "BLOCK_SIZE": context.keys.shape[2], "PAGE_SIZE": page_keys.shape[2] if pages else 1,
        "COLUMNS": min(COLUMNS, 1 << (page.shape[1] - 1).bit_length()) if table else 1,
        "FORMAT": formats[0], "SHARED_FORMAT": formats[1], "SOFT_CAP": soft_cap > 0,
        "BLOCK_M": config.block_m, "TILE": config.tile, "MEMORY_TILE": memory_tile,
        "ONE_BLOCK": grid.one_block, "SPLIT": grid.splits > 1, "MIN_TILES": config.min_tiles, "PART": grid.part,
        "MERGE_STAGES": config.merge_stages(query.shape[2]),
    }  # fmt: skip
    return arguments, constants
