"""Launches the kernels of the cascade: grids, splits, workspaces. Works on whatever the tensors lie on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mem_triton.ops import denylist
from mem_triton.ops.common.architecture import architecture
from mem_triton.ops.common.constants import constants
from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cascade.memory_only_kernel import memory_only_kernel
from mem_triton.ops.memory_attention.cascade.merge_kernel import ROWS, WARPS, merge_kernel
from mem_triton.ops.memory_attention.cascade.shared_kernel import shared_kernel
from mem_triton.ops.memory_attention.fused.launch import OPTIONS, workspace_for
from mem_triton.ops.memory_attention.fused.operands import (
    Output,
    Splits,
    head_of,
    logits_of,
    output_of,
    pages_of,
    queries_of,
    segment_of,
    table_of,
)
from mem_triton.ops.tuning.memory_attention import select_pages, select_shared
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig


class CascadeLaunch(NamedTuple):
    """Compile-time numbers of a launch, from its configuration."""

    BLOCK_M: Any
    TILE: Any
    SPLIT: Any
    MERGE_STAGES: Any


def attend_shared(call: AttentionCall, config: FusedConfig | None = None, workspace: Splits | None = None) -> None:
    """Merge attention over the shared segment into ``out`` and ``lse``, in one launch for the batch."""
    tokens, query_heads, size = call.query.shape
    heads, length = call.shared.keys.shape[:2]
    rows, group = call.context.seq_lens.shape[0], query_heads // heads
    if tokens == 0 or rows == 0 or length == 0:
        return
    config = config or denylist.allowed(
        "shared", select_shared, architecture(call.query.device), size, call.query.element_size(), tokens * group
    )
    blocks = -(-tokens * group // config.block_m)
    tiles = -(-length // config.tile)
    share = -(-tiles // split_count(blocks * heads, tiles, config))
    splits = -(-tiles // share)
    if splits > 1:
        workspace = workspace or workspace_for(call.query.device, config, size)
    arguments = shared_arguments(call, config, workspace, splits > 1, share * config.tile)
    shared_kernel[(blocks, heads, splits)](**arguments, num_warps=config.warps, num_stages=config.stages, **OPTIONS)


def shared_arguments(
    call: AttentionCall, config: FusedConfig, workspace: Splits | None, split: bool, split_length: int
) -> dict[str, Any]:
    """The arguments of ``shared_kernel`` by name."""
    shared, rows = call.shared, call.context.seq_lens.shape[0]
    stride_lse, stride_lse_head = call.lse.stride()
    stride_k_scale, stride_v_scale = (0 if x is None else x.stride(0) for x in (shared.key_scale, shared.value_scale))
    return {
        "query": queries_of(call),
        "output": output_of(call),
        "shared": segment_of(call),
        "splits": workspace,
        "logits": logits_of(call),
        "num_rows": rows,
        "search_steps": (rows - 1).bit_length(),
        "length": shared.keys.shape[1],
        "split_length": split_length,
        "stride_lse": stride_lse,
        "stride_lse_head": stride_lse_head,
        "stride_k_scale": stride_k_scale,
        "stride_v_scale": stride_v_scale,
        "HEAD": head_of(call.query.shape[2], call.query.shape[1] // shared.keys.shape[0]),
        "LAUNCH": launch_of(config, call.query.shape[2], split),
    }


def attend_pages(
    call: AttentionCall, merge: bool = False, config: FusedConfig | None = None, workspace: Splits | None = None
) -> None:
    """Attention over each row's pages: merged into ``out`` and ``lse``, or written for every one of the T tokens."""
    tokens, query_heads, size = call.query.shape
    heads, page_size = call.pages.keys.shape[1:3]
    rows, group, width = call.context.seq_lens.shape[0], query_heads // heads, call.table.page.shape[1]
    if tokens == 0 or (rows == 0 and merge):
        return
    if config is None:
        longest = call.context.max_query_len * group
        key = architecture(call.query.device), size, call.query.element_size(), longest, group
        config = denylist.allowed("pages", select_pages, *key)
    config = config.holding(group)
    blocks = tokens // (config.block_m // group) + rows + 1
    tiles = -(-width * page_size // config.tile)
    share = max(1, -(-width // split_count(blocks * heads, tiles, config)))
    splits = max(1, -(-width // share))
    if splits > 1:
        workspace = workspace or workspace_for(call.query.device, config, size)
    arguments = pages_arguments(call, config, workspace, splits > 1, share, merge)
    memory_only_kernel[(blocks, heads, splits)](
        **arguments, num_warps=config.warps, num_stages=config.stages, **OPTIONS
    )


def pages_arguments(
    call: AttentionCall, config: FusedConfig, workspace: Splits | None, split: bool, split_pages: int, merge: bool
) -> dict[str, Any]:
    """The arguments of ``memory_only_kernel`` by name."""
    stride_lse, stride_lse_head = call.lse.stride()
    return {
        "query": queries_of(call),
        "output": output_of(call),
        "pages": pages_of(call),
        "table": table_of(call),
        "splits": workspace,
        "logits": logits_of(call),
        "num_tokens": call.query.shape[0],
        "num_rows": call.context.seq_lens.shape[0],
        "split_pages": split_pages,
        "stride_lse": stride_lse,
        "stride_lse_head": stride_lse_head,
        "HEAD": head_of(call.query.shape[2], call.query.shape[1] // call.pages.keys.shape[1]),
        "LAUNCH": launch_of(config, call.query.shape[2], split),
        "MERGE": merge,
    }


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """``merge.merge_states`` in one launch."""
    tokens, heads, _ = out.shape
    if tokens == 0:
        return
    arguments = merge_arguments(out_a, lse_a, out_b, lse_b, out, lse)
    # without fused multiply-adds, which would tell a from b
    merge_kernel[(-(-tokens * heads // ROWS),)](**arguments, num_warps=WARPS, enable_fp_fusion=False)


def merge_arguments(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None
) -> dict[str, Any]:
    """The arguments of ``merge_kernel`` by name."""
    tokens, heads, size = out.shape
    strides = {}
    for name, x in (("stride_a", lse_a), ("stride_b", lse_b), ("stride_lse", lse)):
        strides[name], strides[f"{name}_head"] = (0, 0) if x is None else x.stride()
    return {
        "a": Output(out_a, lse_a, None, *out_a.stride()[:2]),
        "b": Output(out_b, lse_b, None, *out_b.stride()[:2]),
        "output": Output(out, lse, None, *out.stride()[:2]),
        "num_rows": tokens * heads,
        **strides,
        "HEAD": head_of(size, heads),
        "ROWS": ROWS,
    }


def split_count(programs: int, tiles: int, config: FusedConfig) -> int:
    """Parts in which to cut ``tiles`` so that a launch of so few programs fills the GPU."""
    return max(1, min(config.programs // programs, config.max_splits, tiles // config.min_tiles))


def launch_of(config: FusedConfig, size: int, split: bool) -> CascadeLaunch:
    return constants(CascadeLaunch, config.block_m, config.tile, split, config.merge_stages(size))
