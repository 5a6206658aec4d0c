"""The arguments of memory attention. Plain tuples of tensors: nothing hides in them.

Shapes: Hq query heads, Hkv KV heads, D head size, P tokens a memory page, N tokens a KV-cache block. A *slot* is a
request's row in persistent device tables; a batch row points to one, or to -1 when its request has no memory.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mem_triton.ops.common.positions import FOREVER
from mem_triton.ops.memory_attention.arguments.packing import Packing

__all__ = ["FOREVER", "AttentionCall", "MemoryPages", "MemoryTable", "PagedContext", "SharedSegment"]


class PagedContext(NamedTuple):
    """The requests' own context in the engine's paged KV cache, causal.

    Row n's queries are ``query_start_loc[n]:query_start_loc[n + 1]`` of the packed batch, at positions
    ``seq_lens[n] - count ... seq_lens[n] - 1``. Rows without queries are padding and touch nothing.
    """

    keys: Tensor | None  # [blocks, Hkv, N, D], any strides but the last, which is 1; None: see ``elsewhere``
    values: Tensor | None  # the same shape and strides as keys
    block_table: Tensor | None  # int32 [rows, max_blocks]
    query_start_loc: Tensor  # int32 [rows + 1]
    seq_lens: Tensor  # int32 [rows], length after this step
    max_query_len: int  # on the host: chooses the grid
    packing: Packing | None = None  # on a CPU: keys and values are [blocks, Hkv, N * D], in this order

    @classmethod
    def elsewhere(cls, query_start_loc: Tensor, seq_lens: Tensor, max_query_len: int) -> PagedContext:
        """Describe rows without keys, values and block table: another kernel attends their context."""
        return cls(None, None, None, query_start_loc, seq_lens, max_query_len)


class MemoryPages(NamedTuple):
    """One layer's pool of memory pages; every KV head of a page may hold other tokens (arXiv 2407.01178, section 3).

    8-bit pages (int8, float8_e4m3fn) are worth ``data * scale``: keys by channel, values by token.
    """

    keys: Tensor  # [pages, Hkv, P, D], any strides but the last, which is 1
    values: Tensor  # the same shape and strides as keys
    key_scale: Tensor | None = None  # fp32 [pages, Hkv, D]
    value_scale: Tensor | None = None  # fp32 [pages, Hkv, P]


class MemoryTable(NamedTuple):
    """Which pages each slot attends to, and which query positions see them. Columns past ``count`` are not read."""

    page: Tensor  # int32 [slots, M]
    tokens: Tensor  # int32 [slots, M], tokens filled in the page, 0..P
    first: Tensor  # int32 [slots, M], first query position that sees the page
    end: Tensor  # int32 [slots, M], first query position that no longer does
    count: Tensor  # int32 [slots], pages in use
    bias: Tensor | None = None  # fp32 [slots, M], added to the scaled logits


class SharedSegment(NamedTuple):
    """Memory that many requests attend to at once, stored once: a MemoryLLM pool, Memory³'s constant prefix."""

    keys: Tensor  # [Hkv, S, D], any strides but the last, which is 1
    values: Tensor  # the same shape and strides as keys
    first: Tensor  # int32 [slots], first query position of a slot that sees the segment
    end: Tensor  # int32 [slots], first that no longer does; first == end: never
    key_scale: Tensor | None = None  # fp32 [Hkv, D], 8-bit data only
    value_scale: Tensor | None = None  # fp32 [Hkv, S]
    bias: float = 0.0


class AttentionCall(NamedTuple):
    """One layer's attention in a step: what is read, which row reads what, and where the result goes.

    query: [T, Hq, D] fp32, bf16 or fp16, any strides but the last; T may exceed the batch's tokens. Hq is a multiple of
    the KV heads; query heads h * Hq // Hkv ... share KV head h. context: the paged KV cache, see ``PagedContext``.
    out: [T, Hq, D] in the query's dtype, written for the tokens of every row and left alone elsewhere.
    scale: of the logits, usually D**-0.5. row_slot: int32 [rows], each row's slot in ``table`` and ``shared``, -1 =
    none; without it, or without pages and shared segment, this is plain causal attention.
    pages, table: Memory³'s sparse memories (arXiv 2407.01178, section 3) or dense prefixes. shared: one for all rows.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap) before bias and mask; 0 = off.
    sinks: fp32 [Hq], one more logit per query head in the denominator. lse: fp32 [T, Hq], written: the natural log of
    the sum over visible keys and the sink. A row that sees nothing gets 0 and -inf.
    only_readers: leave the rows with slot -1 alone, which another backend attends; it takes a ``row_slot``.
    """

    query: Tensor
    context: PagedContext
    out: Tensor | None  # None where a function returns its result
    scale: float
    row_slot: Tensor | None = None
    pages: MemoryPages | None = None
    table: MemoryTable | None = None
    shared: SharedSegment | None = None
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    lse: Tensor | None = None
    only_readers: bool = False
