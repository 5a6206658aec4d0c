"""What ``memory_attention`` requires of its tensors."""

from __future__ import annotations

import torch

from mem_triton.ops.common.checks import FLOATS, check_tensor
from mem_triton.ops.memory_attention.arguments.types import AttentionCall, MemoryPages, PagedContext, SharedSegment

BYTES = (torch.int8, torch.float8_e4m3fn)
_INT, _FP32 = (torch.int32,), (torch.float32,)


def check(call: AttentionCall) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype, device or layout the op cannot take."""
    query, context, pages, table, shared = call.query, call.context, call.pages, call.table, call.shared
    if query.dim() != 3 or query.dtype not in FLOATS:
        raise ValueError(
            f"query: {query.dtype} {tuple(query.shape)}, expected [T, Hq, D] in float32, bfloat16 or float16"
        )
    tokens, heads, size = query.shape
    rows, kv_heads = context.seq_lens.shape[0], _kv_heads(call)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: {heads} heads are not a multiple of the {kv_heads} KV heads")
    expected = [
        ("query", query, query.shape, (query.dtype,)),
        ("out", call.out, query.shape, (query.dtype,)),
        *(() if context.keys is None else _cache(context, kv_heads, size)),
        ("context.query_start_loc", context.query_start_loc, (rows + 1,), _INT),
        ("context.seq_lens", context.seq_lens, (rows,), _INT),
        ("sinks", call.sinks, (heads,), _FP32),
        ("lse", call.lse, (tokens, heads), _FP32),
        ("row_slot", call.row_slot, (rows,), _INT),
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
        if tensors is not None and tensors.keys is not None and tensors.keys.stride() != tensors.values.stride():
            raise ValueError(
                f"{name}.values: strides {tensors.values.stride()}, those of the keys {tensors.keys.stride()}"
            )
    if table is not None:
        for name in ("tokens", "first", "end", "bias"):
            column = getattr(table, name)
            if column is not None and column.stride() != table.page.stride():
                raise ValueError(f"table.{name}: strides {column.stride()}, those of table.page {table.page.stride()}")


def _kv_heads(call: AttentionCall) -> int:
    keys, packing = call.context.keys, call.context.packing
    if keys is None:
        return (call.shared if call.pages is None else call.pages).keys.shape[-3]
    if keys.dim() != (4 if packing is None else 3):
        wanted = "[blocks, Hkv, N, D]" if packing is None else "[blocks, Hkv, N * D], as they are packed"
        raise ValueError(f"context.keys: shape {tuple(keys.shape)}, expected {wanted}")
    if packing is not None and call.query.device.type != "cpu":
        raise ValueError("context.packing: kernels of a GPU read keys and values by token")
    return keys.shape[1]


def _cache(context: PagedContext, kv_heads: int, size: int) -> tuple:
    """What is expected of the KV cache: name, tensor, shape, dtypes."""
    keys, packing = context.keys, context.packing
    block = (kv_heads, *((keys.shape[2], size) if packing is None else (packing.tokens * size,)))
    return (
        ("context.keys", keys, (None, *block), FLOATS),
        ("context.values", context.values, (keys.shape[0], *block), (keys.dtype,)),
        ("context.block_table", context.block_table, (context.seq_lens.shape[0], None), _INT),
    )


def _check_scales(name: str, segment: MemoryPages | SharedSegment) -> None:
    quantised = segment.keys.dtype in BYTES
    for field in ("key_scale", "value_scale"):
        scale = getattr(segment, field)
        if (scale is not None) != quantised:
            need = "8-bit data needs one" if quantised else f"{segment.keys.dtype} data takes none"
            raise ValueError(f"{name}.{field}: {need}")
        if scale is not None and not scale.is_contiguous():
            raise ValueError(f"{name}.{field}: must be contiguous, its strides are {scale.stride()}")
