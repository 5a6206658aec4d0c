"""Launches the kernels of the cascade: grids, splits, workspaces. Works on whatever the tensors lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops import denylist
from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, SharedSegment
from mem_triton.ops.memory_attention.cascade.memory_only_kernel import memory_only_kernel
from mem_triton.ops.memory_attention.cascade.merge_kernel import ROWS, WARPS, merge_kernel
from mem_triton.ops.memory_attention.cascade.shared_kernel import shared_kernel
from mem_triton.ops.memory_attention.fused.launch import (
    FORMATS,
    OPTIONS,
    Workspace,
    architecture,
    channel_parts,
    workspace_for,
)
from mem_triton.ops.tuning.memory_attention import select_pages, select_shared
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig


def attend_shared(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    row_slot: Tensor,
    shared: SharedSegment,
    soft_cap: float = 0.0,
    config: FusedConfig | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Merge attention over the shared segment into ``out`` and ``lse``, in one launch for the batch."""
    tokens, query_heads, size = query.shape
    heads, length = shared.keys.shape[:2]
    rows, group = seq_lens.shape[0], query_heads // heads
    if tokens == 0 or rows == 0 or length == 0:
        return
    config = config or denylist.allowed(
        "shared", select_shared, architecture(query.device), size, query.element_size(), tokens * group
    )
    blocks = -(-tokens * group // config.block_m)
    tiles = -(-length // config.tile)
    share = -(-tiles // split_count(blocks * heads, tiles, config))
    splits = -(-tiles // share)
    if splits > 1:
        workspace = workspace or workspace_for(query.device, config, size)
    shared_kernel[(blocks, heads, splits)](
        query, out, lse, _bits(shared.keys), _bits(shared.values), shared.key_scale, shared.value_scale,
        shared.first, shared.end, row_slot, query_start_loc, seq_lens, *(workspace or (None, None)),
        rows, (rows - 1).bit_length(), length, share * config.tile, scale, soft_cap, float(shared.bias),
        *query.stride()[:2], *out.stride()[:2], *lse.stride(), *shared.keys.stride()[:2],
        *(0 if x is None else x.stride(0) for x in (shared.key_scale, shared.value_scale)),
        **head_constants(size, group, shared.keys.dtype, soft_cap),
        BLOCK_M=config.block_m, TILE=config.tile, SPLIT=splits > 1, MERGE_STAGES=config.merge_stages(size),
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip


def attend_pages(
    query: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    row_slot: Tensor,
    pages: MemoryPages,
    table: MemoryTable,
    soft_cap: float = 0.0,
    merge: bool = False,
    config: FusedConfig | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Attention over each row's pages: merged into ``out`` and ``lse``, or written for every one of the T tokens."""
    tokens, query_heads, size = query.shape
    heads, page_size = pages.keys.shape[1:3]
    rows, group, width = seq_lens.shape[0], query_heads // heads, table.page.shape[1]
    if tokens == 0 or (rows == 0 and merge):
        return
    if config is None:
        key = architecture(query.device), size, query.element_size(), max_query_len * group, group
        config = denylist.allowed("pages", select_pages, *key)
    config = config.holding(group)
    blocks = tokens // (config.block_m // group) + rows + 1
    tiles = -(-width * page_size // config.tile)
    share = max(1, -(-width // split_count(blocks * heads, tiles, config)))
    splits = max(1, -(-width // share))
    if splits > 1:
        workspace = workspace or workspace_for(query.device, config, size)
    memory_only_kernel[(blocks, heads, splits)](
        query, out, lse, _bits(pages.keys), _bits(pages.values), pages.key_scale, pages.value_scale,
        *table, row_slot, query_start_loc, seq_lens, *(workspace or (None, None)),
        tokens, rows, share, scale, soft_cap,
        *query.stride()[:2], *out.stride()[:2], *lse.stride(), *pages.keys.stride()[:3], table.page.stride(0),
        **head_constants(size, group, pages.keys.dtype, soft_cap), PAGE_SIZE=page_size,
        BLOCK_M=config.block_m, TILE=config.tile, SPLIT=splits > 1, MERGE=merge, MERGE_STAGES=config.merge_stages(size),
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None) -> None:
    tokens, heads, size = out.shape
    if tokens == 0:
        return
    width, rest = channel_parts(size)
    merge_kernel[(-(-tokens * heads // ROWS),)](
        out_a, lse_a, out_b, lse_b, out, lse, tokens * heads,
        *out_a.stride()[:2], *lse_a.stride(), *out_b.stride()[:2], *lse_b.stride(), *out.stride()[:2],
        *((0, 0) if lse is None else lse.stride()),
        HEADS=heads, SIZE=size, WIDTH=width, REST=rest, ROWS=ROWS,
        num_warps=WARPS, enable_fp_fusion=False,  # a fused multiply-add would tell a from b
    )  # fmt: skip


def split_count(programs: int, tiles: int, config: FusedConfig) -> int:
    """Parts in which to cut ``tiles`` so that a launch of so few programs fills the GPU."""
    return max(1, min(config.programs // programs, config.max_splits, tiles // config.min_tiles))


def head_constants(size: int, group: int, data: torch.dtype, soft_cap: float) -> dict[str, int]:
    """Compile-time arguments that model and memory fix."""
    width, rest = channel_parts(size)
    return {
        "GROUP": group, "SIZE": size, "WIDTH": width, "REST": rest,
        "FORMAT": FORMATS.get(data, 0), "SOFT_CAP": soft_cap > 0,
    }  # fmt: skip


def _bits(data: Tensor) -> Tensor:
    """float8 as its bits: the kernels decode it themselves, as not every GPU can."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data
