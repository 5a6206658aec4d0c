"""What ``memory_attention`` requires of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.common.checks import FLOATS, check_tensor
from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, PagedContext, SharedSegment

BYTES = (torch.int8, torch.float8_e4m3fn)
_INT, _FP32 = (torch.int32,), (torch.float32,)


def check(
    query: Tensor,
    context: PagedContext,
    out: Tensor,
    *,
    scale: float,
    row_slot: Tensor | None,
    pages: MemoryPages | None,
    table: MemoryTable | None,
    shared: SharedSegment | None,
    soft_cap: float,
    sinks: Tensor | None,
    lse: Tensor | None,
) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype, device or layout the op cannot take."""
    if query.dim() != 3 or query.dtype not in FLOATS:
        raise ValueError(
            f"query: {query.dtype} {tuple(query.shape)}, expected [T, Hq, D] in float32, bfloat16 or float16"
        )
    tokens, heads, size = query.shape
    packing = context.packing
    if context.keys.dim() != (4 if packing is None else 3):
        wanted = "[blocks, Hkv, N, D]" if packing is None else "[blocks, Hkv, N * D], as they are packed"
        raise ValueError(f"context.keys: shape {tuple(context.keys.shape)}, expected {wanted}")
    if packing is not None and query.device.type != "cpu":
        raise ValueError("context.packing: kernels of a GPU read keys and values by token")
    kv_heads, rows = context.keys.shape[1], context.seq_lens.shape[0]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: {heads} heads are not a multiple of the {kv_heads} KV heads")
    cache = (None, kv_heads, *((context.keys.shape[2], size) if packing is None else (packing.tokens * size,)))
    expected = [
        ("query", query, query.shape, (query.dtype,)),
        ("out", out, query.shape, (query.dtype,)),
        ("context.keys", context.keys, cache, FLOATS),
        ("context.values", context.values, (context.keys.shape[0], *cache[1:]), (context.keys.dtype,)),
        ("context.block_table", context.block_table, (rows, None), _INT),
        ("context.query_start_loc", context.query_start_loc, (rows + 1,), _INT),
        ("context.seq_lens", context.seq_lens, (rows,), _INT),
        ("sinks", sinks, (heads,), _FP32),
        ("lse", lse, (tokens, heads), _FP32),
        ("row_slot", row_slot, (rows,), _INT),
    ]
    if pages is not None:
        if table is None:
            raise ValueError("table: needed to say which pages a slot attends to")
        count, page_size = pages.keys.shape[0], pages.keys.shape[2:3]
        slots, width = table.page.shape
        page = (count, kv_heads, *page_size, size)
        expected += [
            ("pages.keys", pages.keys, page, FLOATS + BYTES),
            ("pages.values", pages.values, page, (pages.keys.dtype,)),
            ("pages.key_scale", pages.key_scale, (count, kv_heads, size), _FP32),
            ("pages.value_scale", pages.value_scale, (count, kv_heads, *page_size), _FP32),
            *(
                (f"table.{name}", getattr(table, name), (slots, width), _INT)
                for name in ("page", "tokens", "first", "end")
            ),
            ("table.count", table.count, (slots,), _INT),
            ("table.bias", table.bias, (slots, width), _FP32),
        ]
        _check_scales("pages", pages)
    if shared is not None:
        length = shared.keys.shape[1]
        segment = (kv_heads, length, size)
        slots = shared.first.shape[0] if table is None else table.count.shape[0]
        expected += [
            ("shared.keys", shared.keys, segment, FLOATS + BYTES),
            ("shared.values", shared.values, segment, (shared.keys.dtype,)),
            ("shared.first", shared.first, (slots,), _INT),
            ("shared.end", shared.end, (slots,), _INT),
            ("shared.key_scale", shared.key_scale, (kv_heads, size), _FP32),
            ("shared.value_scale", shared.value_scale, (kv_heads, length), _FP32),
        ]
        _check_scales("shared", shared)
    for name, tensor, shape, dtypes in expected:
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, ("query", query))
    for name, tensors in (("context", context), ("pages", pages), ("shared", shared)):
        if tensors is not None and tensors.keys.stride() != tensors.values.stride():
            raise ValueError(
                f"{name}.values: strides {tensors.values.stride()}, those of the keys {tensors.keys.stride()}"
            )
    if table is not None:
        for name in ("tokens", "first", "end", "bias"):
            column = getattr(table, name)
            if column is not None and column.stride() != table.page.stride():
                raise ValueError(f"table.{name}: strides {column.stride()}, those of table.page {table.page.stride()}")


def _check_scales(name: str, segment: MemoryPages | SharedSegment) -> None:
    quantised = segment.keys.dtype in BYTES
    for field in ("key_scale", "value_scale"):
        scale = getattr(segment, field)
        if (scale is not None) != quantised:
            need = "8-bit data needs one" if quantised else f"{segment.keys.dtype} data takes none"
            raise ValueError(f"{name}.{field}: {need}")
        if scale is not None and not scale.is_contiguous():
            raise ValueError(f"{name}.{field}: must be contiguous, its strides are {scale.stride()}")
