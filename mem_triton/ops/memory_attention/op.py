"""``mem_triton::memory_attention``: one softmax over memory and paged context, as one torch.library op.

The op checks its tensors, then runs ``cpu.dispatch`` on the CPU or, on a GPU, the Triton kernels that ``policy``
names: the fused one (``fused.launch``), or that and the batched shared segment (``cascade.batched``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.memory_attention import invariant
from mem_triton.ops.memory_attention.arguments.checks import check
from mem_triton.ops.memory_attention.arguments.types import MemoryPages, MemoryTable, PagedContext, SharedSegment
from mem_triton.ops.memory_attention.cpu import dispatch
from mem_triton.ops.memory_attention.policy import Policy, choose

_SCHEMA = """memory_attention(
    Tensor query, Tensor[] context, Tensor(a!) out, *, int max_query_len, float scale, Tensor? row_slot,
    Tensor?[] pages, Tensor?[] table, Tensor?[] shared, float shared_bias, float soft_cap, Tensor? sinks,
    Tensor(b!)? lse, bool only_readers) -> ()"""


def memory_attention(
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
    policy: Policy | None = None,
) -> None:
    """Attend each query to its row's memory and causal context in one softmax; ``reference.py`` is the specification.

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
    policy: which kernels run on a GPU; None = the table in ``ops/tuning/memory_attention.py``. With ``batch_invariant``
    a row's bits are the same alone and in any batch, on a CPU too (``invariant.py`` says what else is promised).

    No host sync and no data-dependent shape on a GPU. A row with slot -1 gets the bits of a call without memory.
    ValueError names the tensor that does not fit. Example::

        memory_attention(query, context, out, scale=64**-0.5, row_slot=slots, pages=pages, table=table)
    """
    options = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks, "lse": lse, "row_slot": row_slot}
    options["only_readers"] = only_readers
    # The op boundary is for tracers (torch.compile, fake tensors); without one it would only cost time in every layer.
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        if policy is not None or context.packing is not None:
            raise ValueError("policy, context.packing: a traced call takes the default; pass None")
        keys_bias = (list(shared[:-1]), float(shared.bias)) if shared is not None else ([], 0.0)
        torch.ops.mem_triton.memory_attention(
            query,
            list(context[:5]),
            out,
            max_query_len=context.max_query_len,
            **options,
            pages=list(pages or ()),
            table=list(table or ()),
            shared=keys_bias[0],
            shared_bias=keys_bias[1],
        )
    else:
        _run(query, context, out, pages=pages, table=table, shared=shared, policy=policy, **options)


def _run(
    query: Tensor,
    context: PagedContext,
    out: Tensor,
    *,
    pages: MemoryPages | None,
    table: MemoryTable | None,
    shared: SharedSegment | None,
    policy: Policy | None,
    **options: Any,
) -> None:
    only_readers = options.pop("only_readers")
    if options["row_slot"] is None or (pages is None and shared is None):
        if only_readers:
            return  # nobody reads
        options["row_slot"] = pages = table = shared = None
    check(query, context, out, pages=pages, table=table, shared=shared, **options)
    memory = {"row_slot": options.pop("row_slot"), "pages": pages, "table": table, "shared": shared}
    if policy is not None and policy.batch_invariant:
        if only_readers:
            raise ValueError("only_readers: in the batch-invariant way all rows are attended here")
        invariant.attend(query, context, out, **memory, **options)
        return
    if query.device.type == "cpu":
        dispatch.attend(query, context, out, only_readers=only_readers, **memory, **options)
        return
    from mem_triton.ops.memory_attention.cascade import batched  # Triton is there on Linux only
    from mem_triton.ops.memory_attention.fused import launch

    policy = policy or choose(
        launch.architecture(query.device),
        rows=len(context.seq_lens),
        shared_tokens=0 if shared is None else shared.keys.shape[1],
        head_dim=query.shape[2],
    )
    path = batched if policy.route == "shared_batched" and shared is not None else launch
    path.attend(query, context, out, only_readers=only_readers, **memory, **options)


def _run_flat(query, context, out, *, max_query_len, pages, table, shared, shared_bias, **options) -> None:
    """``_run`` behind the op's schema, which has lists of tensors for the named tuples."""
    _run(
        query,
        PagedContext(*context, max_query_len),
        out,
        policy=None,
        pages=MemoryPages(*pages) if pages else None,
        table=MemoryTable(*table) if table else None,
        shared=SharedSegment(*shared, shared_bias) if shared else None,
        **options,
    )


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("memory_attention", _run_flat, _device)
torch.library.register_fake("mem_triton::memory_attention", lambda *args, **kwargs: None, lib=_LIBRARY)
