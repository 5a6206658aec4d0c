"""Keeps a worker's tables of explicit memory: the pages that each running request reads, from which positions.

Engine-neutral. A request *enters* with its plan and the pages that hold it, and *leaves* when it is finished or
preempted. Before each step the engine calls ``set_rows`` with the batch's order and positions; only the pages that the
step's tokens see are in the tables then, so a long prompt's earlier references cost a decode step nothing. Kernels read
the persistent device tables, so a captured CUDA graph sees every change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mem_triton.ops.memory_attention.arguments.types import MemoryTable
from mem_triton.store.pool.plan import FOREVER, Attachment


class Run(Protocol):
    """The pages of a reference, in order, and the tokens in them."""

    pages: tuple[int, ...]
    tokens: int


@dataclass
class _TableRow:
    slot: int
    plan: tuple[Attachment, ...]
    runs: Mapping[str, Run]  # by reference
    visible: tuple[int, ...] | None = None  # which attachments the table shows now; None: nothing written yet
    since: int = 0  # first position of a step from which on the table holds ...
    until: int = 0  # ... and the first position that sees something else


@dataclass
class MemoryTables:
    """Persistent device tables for ``slots`` running requests, of at most ``max_pages`` pages seen in one step each.

    table: see ``MemoryTable``. row_slot: int32 [slots], one entry a batch row, -1 without memory. sink_first, sink_end:
    int32 [slots], the query positions that see the bank's constant prefix: all those of requests with memory.
    """

    slots: int
    max_pages: int
    page_tokens: int
    device: torch.device
    _free: list[int] = field(init=False)
    _requests: dict[str, _TableRow] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=self.device)

        self._rows = zeros(4, self.slots, self.max_pages)  # page, tokens, first, end
        self._counts = zeros(self.slots)
        self.table = MemoryTable(*self._rows, count=self._counts)
        self.row_slot = zeros(self.slots) - 1
        self.sink_first = zeros(self.slots)
        self.sink_end = zeros(self.slots) + FOREVER
        self._free = list(range(self.slots))
        self._rows_are_plain = True
        self._written: list[int] = []  # what ``row_slot`` holds

    def enter(self, request_id: str, plan: tuple[Attachment, ...], runs: Mapping[str, Run]) -> None:
        """Register a request that joins the batch. plan: () for a plain one. runs: where each reference lies."""
        if plan and request_id not in self._requests:
            self._requests[request_id] = _TableRow(self._free.pop(), plan, runs)

    def leave(self, request_id: str) -> None:
        """Forget a request that left the batch."""
        running = self._requests.pop(request_id, None)
        if running is not None:
            self._free.append(running.slot)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request in the batch reads memory."""
        return request_id in self._requests

    def readers(self, pages: Iterable[int]) -> list[str]:
        """The requests in the batch that read one of these pages."""
        wanted = set(pages)
        return [
            id
            for id, running in self._requests.items()
            if any(not wanted.isdisjoint(run.pages) for run in running.runs.values())
        ]

    def set_rows(
        self,
        request_ids: Sequence[str],
        first: Sequence[int],
        last: Sequence[int],
        faults: dict[str, Exception] | None = None,
    ) -> None:
        """Write the batch's order, and the pages that its tokens at positions first..last see, into the tables.

        faults: takes the requests whose pages cannot be written, with the reasons; their rows have no memory then.
        Without it the first one raises RuntimeError.
        """
        if not self._requests and self._rows_are_plain:
            return
        rows = []
        for request_id, start, end in zip(request_ids, first, last, strict=True):
            running = self._requests.get(request_id)
            try:
                if running is not None and not (running.since <= start and end < running.until):
                    self._show(running, int(start), int(end))
            except Exception as error:
                if faults is None:
                    raise
                faults[request_id], running = error, None
            rows.append(-1 if running is None else running.slot)
        rows += [-1] * (self.slots - len(rows))
        if rows != self._written:
            self.row_slot.copy_(self._staged(rows), non_blocking=True)
            self._written = rows
        self._rows_are_plain = not self._requests

    def forget_rows(self) -> None:
        """After a failure: no row of the coming step has memory."""
        self.row_slot.fill_(-1)
        self._written = []

    def clear_rows(self) -> None:
        """Dummy and warm-up batches: no row has memory."""
        self.set_rows([], [], [])

    def _show(self, running: _TableRow, first: int, last: int) -> None:
        visible = tuple(i for i, a in enumerate(running.plan) if a.first <= last and a.end > first)
        coming = [a.first for a in running.plan if a.first > last] + [a.end for a in running.plan if a.end > first]
        since_until = first, min(coming, default=FOREVER)
        if visible == running.visible:
            running.since, running.until = since_until
            return
        columns = [c for i in visible for c in self._columns(running.plan[i], running.runs)]
        if len(columns) > self.max_pages:
            raise RuntimeError(f"{len(columns)} memory pages are seen in one step, the tables hold {self.max_pages}")
        running.visible, (running.since, running.until) = visible, since_until
        slot = running.slot
        if columns:
            self._rows[:, slot, : len(columns)].copy_(self._staged(columns).T, non_blocking=True)
        self._counts[slot : slot + 1].copy_(self._staged([len(columns)]), non_blocking=True)

    def _columns(self, attachment: Attachment, runs: Mapping[str, Run]) -> Iterable[list[int]]:
        run = runs[attachment.ref]
        for i, page in enumerate(run.pages):
            yield [page, min(self.page_tokens, run.tokens - i * self.page_tokens), attachment.first, attachment.end]

    def _staged(self, values: Any) -> Tensor:
        staged = torch.tensor(values, dtype=torch.int32)
        return staged.pin_memory() if self._rows.is_cuda else staged
