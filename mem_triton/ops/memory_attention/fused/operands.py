"""What the attention kernels take, in groups: Triton takes tuples apart when it compiles a kernel.

A field that is None, 1 or a ``tl.constexpr`` (in capitals) is a constant of the compiled kernel, and of other integers
it knows whether 16 divides them, as of arguments that stand alone. ``do_not_specialize`` does not reach into tuples: so
what changes from step to step stands alone. No field may be called "values" or "type", as Triton's own tuples have
attributes of these names. What is absent as a whole is a tuple of None: Triton 3.6 cannot compare a tuple with None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem_triton.ops.common.constants import constant, constants
from mem_triton.ops.memory_attention.arguments.types import AttentionCall, MemoryPages, SharedSegment

FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}


class Head(NamedTuple):
    """A head's channels come in two parts, a power of two and the rest (80 = 64 + 16)."""

    GROUP: Any  # query heads that share a KV head
    SIZE: Any  # channels
    WIDTH: Any  # of the first part
    REST: Any  # of the second part, a power of two as well; 0 = none


class Queries(NamedTuple):
    data: Any  # [T, Hq, D]
    start_loc: Any  # int32 [rows + 1]
    seq_lens: Any  # int32 [rows]
    slot: Any  # int32 [rows] or None
    stride: Any
    stride_head: Any


class Output(NamedTuple):
    data: Any  # [T, Hq, D]
    lse: Any  # fp32 [T, Hq] or None; its strides stand alone
    sinks: Any  # fp32 [Hq] or None
    stride: Any
    stride_head: Any


class Context(NamedTuple):
    k: Any  # [blocks, Hkv, N, D]
    v: Any
    block_table: Any  # int32 [rows, max_blocks]; its stride stands alone
    stride_block: Any
    stride_head: Any
    stride_token: Any
    BLOCK_SIZE: Any


class Pages(NamedTuple):
    k: Any  # [pages, Hkv, P, D]
    v: Any
    k_scale: Any  # fp32 [pages, Hkv, D] or None
    v_scale: Any  # fp32 [pages, Hkv, P] or None
    stride_page: Any
    stride_head: Any
    stride_token: Any
    PAGE_SIZE: Any
    FORMAT: Any  # 0 as the queries, 1 int8, 2 the bits of float8_e4m3fn


class Table(NamedTuple):
    page: Any  # int32 [slots, M], as all but ``count`` and ``bias``
    tokens: Any
    first: Any
    end: Any
    used: Any  # int32 [slots]
    bias: Any  # fp32 [slots, M] or None
    stride: Any


class Segment(NamedTuple):
    k: Any  # [Hkv, S, D]
    v: Any
    k_scale: Any  # fp32 [Hkv, D] or None
    v_scale: Any  # fp32 [Hkv, S] or None
    first: Any  # int32 [slots]
    end: Any
    bias: Any
    tokens: Any  # S, or None where it stands alone
    stride_head: Any
    stride_token: Any
    FORMAT: Any


class Logits(NamedTuple):
    scale: Any
    soft_cap: Any  # None = off


class Splits(NamedTuple):
    """What splits of a block of queries leave for the last of them. One launch at a time may use it."""

    partial: Any  # fp32 [cells, BLOCK_M, padded D + 4]
    counter: Any  # int32 [blocks * heads], zeros before and after every launch


def channel_parts(size: int) -> tuple[int, int]:
    """A head's channels as a power of two and the rest, at least 16: 80 = 64 + 16, 128 = 128 + 0."""
    width = 1 << (size.bit_length() - 1)
    rest = size - width
    return width, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def head_of(size: int, group: int) -> Head:
    return constants(Head, group, size, *channel_parts(size))


def queries_of(call: AttentionCall) -> Queries:
    context = call.context
    return Queries(call.query, context.query_start_loc, context.seq_lens, call.row_slot, *call.query.stride()[:2])


def output_of(call: AttentionCall, sinks: Tensor | None = None) -> Output:
    return Output(call.out, call.lse, sinks, *call.out.stride()[:2])


def context_of(call: AttentionCall) -> Context:
    keys, values, block_table = call.context[:3]
    return Context(keys, values, block_table, *keys.stride()[:3], constant(keys.shape[2]))


def pages_of(call: AttentionCall) -> Pages:
    if call.pages is None:
        return Pages(*(None,) * len(Pages._fields))
    keys, values, key_scale, value_scale = call.pages
    shape = constant(keys.shape[2]), constant(FORMATS.get(keys.dtype, 0))
    return Pages(_bits(keys), _bits(values), key_scale, value_scale, *keys.stride()[:3], *shape)


def table_of(call: AttentionCall) -> Table:
    return Table(*(None,) * 7) if call.table is None else Table(*call.table, call.table.page.stride(0))


def segment_of(call: AttentionCall, tokens: int | None = None) -> Segment:
    if call.shared is None:
        return Segment(*(None,) * len(Segment._fields))
    keys, values, first, end, key_scale, value_scale, bias = call.shared
    return Segment(
        _bits(keys),
        _bits(values),
        key_scale,
        value_scale,
        first,
        end,
        float(bias),
        tokens,
        *keys.stride()[:2],
        constant(FORMATS.get(keys.dtype, 0)),
    )


def logits_of(call: AttentionCall) -> Logits:
    return Logits(call.scale, call.soft_cap if call.soft_cap > 0 else None)


def is_quantised(segment: MemoryPages | SharedSegment | None) -> bool:
    return segment is not None and segment.keys.dtype in FORMATS


def _bits(data: Tensor) -> Tensor:
    """float8 as its bits: the kernels decode it themselves, as not every GPU can."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data
