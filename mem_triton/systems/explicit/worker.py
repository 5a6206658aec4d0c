"""Keeps a worker's pool of pages, constant prefix, tables, loader and captures: explicit memory's worker part.

Made before the engine sizes its KV cache, so that the pool is accounted for and the cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mem_triton.ops.memory_attention import MemoryPages, SharedSegment
from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config
from mem_triton.schema import ConfigError
from mem_triton.store.bank import Bank
from mem_triton.store.block import MemoryBlock
from mem_triton.store.pool.loader import PageLoader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.placement import place, place_sink, tempered
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.base import StepBatch, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.head import head_end
from mem_triton.systems.explicit.layout import GIB, layout_of
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.worker_captures import WorkerCaptures
from mem_triton.systems.payload import SystemPayload


@dataclass(frozen=True)
class BankSegments:
    """What one attention layer reads besides its context."""

    tables: MemoryTables
    pages: MemoryPages | None  # None in layers that are no memory layers
    sink: SharedSegment | None  # the bank's constant prefix, in every layer

    def read(self, rows: int) -> dict[str, Any]:
        """What ``memory_attention`` takes besides the context, for a batch of ``rows`` rows, padding included."""
        read: dict[str, Any] = {"row_slot": self.tables.row_slot[:rows], "shared": self.sink}
        return read if self.pages is None else read | {"pages": self.pages, "table": self.tables.table}


class ExplicitMemory(WorkerPart):
    """One rank's. tables: who sees what. pool: of the bank's layers that this rank has. loader: fills pages."""

    def __init__(self, shape: EngineShape, section: MemorySection, host: WorkerHost) -> None:
        self._host, layers, device = host, host.layers, host.device
        self.calls = {
            "load_page": self.load_page,
            "captured": self.captured,
            "drop_captures": self.drop_captures,
        }
        self.bank = Bank.open(section.bank)
        spec = self.bank.spec
        self.layout = layout_of(shape, section, spec)
        ropes = {index: rope_from_config(shape.hf_config, index) for index in layers}
        heads = _heads(spec.kv_heads, self.layout.kv_heads, host.tp_rank, shape.tp_size)
        own = {index: ropes[index] for index in spec.layers if index in ropes}  # memory layers

        layout = self.layout
        self.tables = MemoryTables(shape.max_requests, layout.max_pages, layout.page_tokens, device)
        self.pool = PagePool(
            len(own), layout.kv_heads, layout.head_dim, layout.page_tokens, layout.num_pages, layout.dtype, device
        )

        @contextmanager
        def read(ref: str) -> Iterator[MemoryBlock]:
            if (end := head_end(ref)) is not None:
                yield place_sink(_part(self.bank.sink(), list(own), heads), list(own.values()), end)
                return
            with self.bank.reading(ref, layers=list(own), heads=heads, deleted=True) as block:
                placed = place(block, list(own.values()), spec.kind, spec.reference_tokens)
                yield tempered(placed, self.layout.temperature)

        host_bytes = int(section.host_gib * GIB)
        self.loader = PageLoader(self.pool, read, host_bytes, readers=self.tables.readers)
        self.captures = WorkerCaptures(own, heads.start, host.rank, host.read_kv)
        sinks = self._sinks(ropes, heads, shape.dtype, device)
        self._layers = {}
        for index in layers:
            pages = self.pool.layer(list(own).index(index)) if index in own else None
            if pages is not None or index in sinks:
                self._layers[index] = BankSegments(self.tables, pages, sinks.get(index))

    def _sinks(
        self, ropes: Mapping[int, RotaryEmbedding], heads: slice, dtype: torch.dtype, device: torch.device
    ) -> dict[int, SharedSegment]:
        """The bank's constant prefix by layer, at its place before all references; empty if the bank has none.

        Raises ConfigError for one with numbers that the engine's dtype cannot hold.
        """
        block = self.bank.sink()
        if block is None or self.bank.spec.kind == "parallel":  # there it is the head, in each request's own place
            return {}
        indices = sorted(ropes)  # the sink is stored for all layers of the model
        placed = place_sink(
            _part(block, indices, heads), [ropes[index] for index in indices], self.bank.spec.reference_tokens
        )
        if not bool(placed.keys.to(dtype).isfinite().all() and placed.values.to(dtype).isfinite().all()):
            raise ConfigError(
                f"mem_triton.memory.bank: its constant prefix has numbers beyond {dtype}; serve another dtype"
            )
        first, end = self.tables.sink_first, self.tables.sink_end
        return {
            index: SharedSegment(placed.keys[i].to(device, dtype), placed.values[i].to(device, dtype), first, end)
            for i, index in enumerate(indices)
        }

    def segments(self, layer: int) -> BankSegments | None:
        return self._layers.get(layer)

    def load_page(self, *order: Any) -> Future[dict[str, Any]]:
        """Fill an entry's pages in the background, behind the steps that are queued; see ``PageLoad.order``.

        Answered when they are filled: {"error": None, or why they could not be, "stats": the loader's counts}.
        """
        answer: Future[dict[str, Any]] = Future()
        with self._host.exclusive():
            over = self.loader.load(PageLoad(*order))
        over.add_done_callback(lambda over: answer.set_result({"error": over.result(), "stats": self.loader.stats()}))
        return answer

    def captured(self, lease: str) -> Future[dict[str, str]]:
        """Answered when this rank's part of a kept prompt is written: {"file": path}, or {"error": reason}."""
        with self._host.exclusive():
            return self.captures.outcome(lease)

    def drop_captures(self, leases: list[str]) -> None:
        """Forget captures; nothing of them stays here or on the disk."""
        with self._host.exclusive():
            self.captures.drop(leases)

    def describe(self) -> str:
        """Describe the memory in one line, for the log."""
        layout, spec = self.layout, self.bank.spec
        return (
            f"bank {self.bank.path} ({spec.kind}), {len(self.captures.ropes)} memory layer(s) here, {layout.num_pages} "
            f"pages of {layout.page_tokens} tokens ({self.pool.nbytes / GIB:.2f} GiB), {layout.dtype}"
        )

    def enter(self, request_id: str, payload: SystemPayload) -> None:
        """A request joins the batch. Raises RuntimeError if its pages were given away in the meantime."""
        for ref, run in payload.pages.items():
            if not self.loader.holds(ref, run.pages):
                raise RuntimeError(f"the pages of {ref} hold something else by now")
        self.tables.enter(request_id, payload.plan, payload.pages)
        self.captures.enter(request_id, payload.capture)

    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch; its KV is still its own."""
        self.tables.leave(request_id)
        self.loader.retry()
        self.captures.leave(request_id)

    def begin_step(self, step: StepBatch) -> dict[str, Exception]:
        faults: dict[str, Exception] = {}
        self.tables.set_rows(step.request_ids, step.first, step.last, faults)
        self.captures.set_rows(step.request_ids, step.last)
        self.loader.before_step()
        return faults

    def __contains__(self, request_id: object) -> bool:
        """Whether a request in the batch reads the bank."""
        return request_id in self.tables

    def forget_rows(self) -> None:
        """After a failure: no row of the coming step has memory."""
        self.tables.forget_rows()

    def drop_request(self, request_id: str) -> None:
        """A request has lost its memory: it goes on as a plain one, and nothing of it is kept."""
        self.tables.leave(request_id)
        self.loader.retry()
        self.captures.drop_request(request_id)


def _part(block: MemoryBlock, layers: Sequence[int], heads: slice) -> MemoryBlock:
    """A rank's layers and heads of a block that is stored for all of them."""
    layers = list(layers)
    return MemoryBlock(*(tensor[layers][:, heads] for tensor in (block.keys, block.values, block.positions)))


def _heads(total: int, here: int, rank: int, ranks: int) -> slice:
    """A tensor-parallel rank's KV heads. Ranks beyond the number of heads repeat them, as engines do."""
    first = rank * here if ranks <= total else rank * total // ranks
    return slice(first, first + here)
