"""Batch-invariant attention: a row's bits follow from the row alone.

Promised, wherever it runs: the same bits alone and in any batch, for any padding and any width of the block table.
On a GPU also: the same bits for a prompt in one step or in several, of two tokens each or more, if all of its queries
see its memories. Nothing is promised between GPUs, versions, or a decode step and a prefill of the same token.

On a GPU rows of one query and all others are launched apart, each with a configuration that no batch changes: the
former in SPLITS parts of the row's own length, merged in order; the latter undivided, tile by tile from the first key
on. The shared segment is read once per row, as the batched way packs rows together. On a CPU every row is attended
alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.cpu import dispatch

SPLITS = 8
"""Parts of a decode row's keys. A constant, as more for small batches would change bits; fewer fill a GPU less well."""
ROWS = 128
"""Decode rows of one launch; more take several, one after the other, so that the parts' sums take no more than 67 MiB
for 8 KV heads of 128 channels, whatever the batch (all of 1,024 rows at once would take 0.5 GiB)."""
LONG = 64
"""Rows of a program for queries that come in numbers: what feeds the widest matrix instructions."""


def attend(call: AttentionCall) -> None:
    """Attend a call that is already checked."""
    if call.query.device.type == "cpu":
        _attend_rows(call)
    else:
        launch_parts(call)


def _attend_rows(call: AttentionCall) -> None:
    """Row by row, on a copy of its queries: torch picks its way by shapes, strides and where data begin."""
    context = call.context
    for row, (begin, end) in enumerate(pairwise(context.query_start_loc.tolist())):
        if begin == end:
            continue
        one, starts = slice(row, row + 1), context.query_start_loc.new_tensor([0, end - begin])
        dispatch.attend(
            call._replace(
                query=call.query[begin:end].clone(memory_format=torch.contiguous_format),
                context=context._replace(
                    block_table=context.block_table[one], query_start_loc=starts, seq_lens=context.seq_lens[one]
                ),
                out=call.out[begin:end],
                row_slot=None if call.row_slot is None else call.row_slot[one],
                lse=None if call.lse is None else call.lse[begin:end],
            )
        )


def launch_parts(call: AttentionCall) -> None:
    """One launch for each ROWS single queries, and one for all longer rows. Works on whatever the tensors lie on."""
    from mem_triton.ops import denylist
    from mem_triton.ops.memory_attention.fused import launch
    from mem_triton.ops.tuning.memory_attention_fused import select

    query, context = call.query, call.context
    tokens, query_heads, size = query.shape
    rows, heads = context.seq_lens.shape[0], context.keys.shape[1]
    if tokens == 0 or rows == 0:
        return
    group, architecture = query_heads // heads, launch.architecture(query.device)
    for part, programs_rows in ((1, group), (2, max(group, LONG))):
        if part == 2 and context.max_query_len == 1:
            return
        config = denylist.allowed("attention", select, architecture, size, query.element_size(), programs_rows, group)
        if part == 2:
            blocks = tokens // (config.block_m // group) + rows
            launch.run(call, config, launch.Grid(blocks, heads, 1, one_block=False, part=part), None)
            return
        for first in range(0, rows, ROWS):
            few = slice(first, min(first + ROWS, rows))
            count = few.stop - first
            some = context._replace(
                block_table=context.block_table[few],
                seq_lens=context.seq_lens[few],
                query_start_loc=context.query_start_loc[first : few.stop + 1],
            )
            slots = None if call.row_slot is None else call.row_slot[few]
            cells = 1 << (count * heads * SPLITS - 1).bit_length()  # few sizes, as they are kept
            workspace = launch.workspace_for(query.device, replace(config, programs=cells), size)
            grid = launch.Grid(count, heads, SPLITS, one_block=True, part=part)
            launch.run(call._replace(context=some, row_slot=slots), config, grid, workspace)
