"""Layers' attention on a CPU, prepared: what stays of a layer once, what its layers share once a step.

``memory_attention`` looks at every tensor of every call. In an engine's steps most of them are those of the layer
before, and of the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.checks import check
from mem_triton.ops.memory_attention.arguments.types import AttentionCall
from mem_triton.ops.memory_attention.op import memory_attention

Plans = dict[tuple[Any, ...], tuple[AttentionCall, np.ndarray, np.ndarray]]
"""A step's: by what distinguishes its layers, which are a group's heads and the tables that they read, the call that it
was made of, its blocks of queries, and addresses."""


class PlannedLayer:
    """One layer's attention over memory and context."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._call: AttentionCall | None = None  # holds the tensors whose addresses are in ``_layer``
        self._layer: np.ndarray | None = None
        self._kind: tuple[Any, ...] = ()

    def attend(
        self, query: Tensor, out: Tensor, cache: Tensor, plans: Plans, make: Callable[[], AttentionCall]
    ) -> None:
        """The same as ``memory_attention(make())``, of the rows that read memory.

        query, out: the call's, in any shape. cache: tells the layer's KV cache from another. plans: of the step, empty
        in its first layer. make: the call; between steps of a layer nothing else changes but the queries and what the
        tensors hold. Raises ValueError as the op does, for what a step has in common in its first layer.
        """
        if query.device.type != "cpu":
            memory_attention(make())
            return
        from mem_triton.ops.memory_attention.cpu import paged_numba  # vLLM's start trips over it

        key = (cache.data_ptr(), cache.stride(), query.dtype, query.stride(), out.stride())
        if key != self._key:
            call = make()
            memory_attention(call)
            known = call.only_readers and call.row_slot is not None and call.lse is None
            known = known and not (call.pages is None and call.shared is None) and paged_numba.takes(call)
            self._layer = paged_numba.layer_of(call) if known else None
            tables = (call.row_slot, call.table and call.table.page, call.shared and call.shared.first)
            places = (None if tensor is None else tensor.data_ptr() for tensor in tables)
            self._kind = (call.query.shape[1] // call.context.keys.shape[1], *places)
            self._call, self._key = call, key
            return
        if self._layer is None:
            memory_attention(make())
            return
        plan = plans.get(self._kind)
        if plan is None:
            call = make()
            check(call)
            plan = plans[self._kind] = (call, _blocks(call, self._kind[0]), paged_numba.step_of(call))
        paged_numba.run(plan[1], plan[2], self._layer, query, out, None)


def _blocks(call: AttentionCall, group: int) -> np.ndarray:
    from mem_triton.ops.memory_attention.cpu import paged_numba

    starts = call.context.query_start_loc.numpy()
    counts = np.where(call.row_slot.numpy() < 0, 0, starts[1:] - starts[:-1])
    return paged_numba.blocks_of(counts, group)
