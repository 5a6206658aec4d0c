"""``mem_triton::memory_attention``: one softmax over memory and paged context, as one torch.library op.

The op checks its tensors, then runs ``cpu.dispatch`` on the CPU or, on a GPU, the Triton kernels that ``policy``
names: the fused one (``fused.launch``), or that and the batched shared segment (``cascade.batched``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.memory_attention import invariant
from mem_triton.ops.memory_attention.arguments.checks import check
from mem_triton.ops.memory_attention.arguments.types import (
    AttentionCall,
    MemoryPages,
    MemoryTable,
    PagedContext,
    SharedSegment,
)
from mem_triton.ops.memory_attention.cpu import dispatch
from mem_triton.ops.memory_attention.policy import Policy, choose_for

_SCHEMA = """memory_attention(
    Tensor query, Tensor[] context, Tensor(a!) out, *, int max_query_len, float scale, Tensor? row_slot,
    Tensor?[] pages, Tensor?[] table, Tensor?[] shared, float shared_bias, float soft_cap, Tensor? sinks,
    Tensor(b!)? lse, bool only_readers) -> ()"""


def memory_attention(call: AttentionCall, *, policy: Policy | None = None) -> None:
    """Attend each query to its row's memory and causal context in one softmax; ``reference.py`` is the specification.

    call: see ``AttentionCall``; its ``out`` and ``lse`` are written.
    policy: which kernels run on a GPU; None = the table in ``ops/tuning/memory_attention.py``. With ``batch_invariant``
    a row's bits are the same alone and in any batch, on a CPU too (``invariant.py`` says what else is promised).

    No host sync and no data-dependent shape on a GPU. A row with slot -1 gets the bits of a call without memory.
    ValueError names the tensor that does not fit. Example::

        memory_attention(AttentionCall(query, context, out, 64**-0.5, row_slot=slots, pages=pages, table=table))
    """
    # The op boundary is for tracers (torch.compile, fake tensors); without one it would only cost time in every layer.
    if torch.compiler.is_compiling() or type(call.query) is not Tensor:
        if policy is not None or call.context.packing is not None:
            raise ValueError("policy, context.packing: a traced call takes the default; pass None")
        _trace(call)
    else:
        _run(call, policy)


def _trace(call: AttentionCall) -> None:
    """Call the op, whose schema has lists of tensors for the named tuples."""
    torch.ops.mem_triton.memory_attention(
        call.query,
        list(call.context[:5]),
        call.out,
        max_query_len=call.context.max_query_len,
        scale=call.scale,
        row_slot=call.row_slot,
        pages=list(call.pages or ()),
        table=list(call.table or ()),
        shared=list(call.shared[:-1]) if call.shared is not None else [],
        shared_bias=float(call.shared.bias) if call.shared is not None else 0.0,
        soft_cap=call.soft_cap,
        sinks=call.sinks,
        lse=call.lse,
        only_readers=call.only_readers,
    )


def _run_flat(query, context, out, *, max_query_len, pages, table, shared, shared_bias, **options) -> None:
    """What the op does with the arguments of ``_trace``."""
    call = AttentionCall(query, PagedContext(*context, max_query_len), out, **options)
    segments = {
        "pages": MemoryPages(*pages) if pages else None,
        "table": MemoryTable(*table) if table else None,
        "shared": SharedSegment(*shared, shared_bias) if shared else None,
    }
    _run(call._replace(**segments), None)


def _run(call: AttentionCall, policy: Policy | None) -> None:
    if call.row_slot is None or (call.pages is None and call.shared is None):
        if call.only_readers:
            return  # nobody reads
        call = call._replace(row_slot=None, pages=None, table=None, shared=None)
    check(call)
    if policy is not None and policy.batch_invariant:
        if call.only_readers:
            raise ValueError("only_readers: in the batch-invariant way all rows are attended here")
        invariant.attend(call)
        return
    if call.query.device.type == "cpu":
        dispatch.attend(call)
        return
    from mem_triton.ops.memory_attention.cascade import batched  # Triton is there on Linux only
    from mem_triton.ops.memory_attention.fused import launch

    policy = policy or choose_for(launch.architecture(call.query.device), call)
    (batched if policy.route == "shared_batched" and call.shared is not None else launch).attend(call)


_LIBRARY = torch.library.Library("mem_triton", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("memory_attention", _run_flat, _device)
torch.library.register_fake("mem_triton::memory_attention", lambda *args, **kwargs: None, lib=_LIBRARY)
