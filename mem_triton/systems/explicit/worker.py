"""Explicit memory's worker part: the pool of pages, the bank's constant prefix, the tables, the loader, the captures.

Made before the engine sizes its KV cache, so that the pool is accounted for and the cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mem_triton.store.pool.placement import place, place_sink
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.base import StepBatch, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.explicit.layout import GIB, layout_of
from mem_triton.systems.explicit.section import MemorySection
from mem_triton.systems.explicit.worker_captures import Captures
from mem_triton.systems.payload import SystemPayload


@dataclass(frozen=True)
class LayerMemory:
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
            "load_pages": self.load_pages, "pages_state": self.pages_state, "capture_state": self.capture_state,
            "drop_captures": self.drop_captures,
        }  # fmt: skip
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

        def read(ref: str) -> Any:
            block = self.bank.load(ref, layers=list(own), heads=heads, deleted=True)
            return place(block, list(own.values()), spec.kind, spec.reference_tokens)

        self.loader = PageLoader(self.pool, read, host_bytes=int(section.host_gib * GIB))
        self._held: dict[int, str] = {}  # page -> the entry that it was ordered for last
        self._held_back: list[tuple[str, tuple[int, ...]]] = []  # orders for pages that are still read
        self._given_away: set[str] = set()  # requests of the batch whose pages were filled anew
        self.captures = Captures(own, heads.start, host.rank, host.read_kv)
        sinks = self._sinks(ropes, heads, shape.dtype, device)
        self._layers = {}
        for index in layers:
            pages = self.pool.layer(list(own).index(index)) if index in own else None
            if pages is not None or index in sinks:
                self._layers[index] = LayerMemory(self.tables, pages, sinks.get(index))

    def _sinks(
        self, ropes: Mapping[int, RotaryEmbedding], heads: slice, dtype: torch.dtype, device: torch.device
    ) -> dict[int, SharedSegment]:
        """The bank's constant prefix by layer, at its place before all references; empty if the bank has none.

        Raises ConfigError for one with numbers that the engine's dtype cannot hold.
        """
        block = self.bank.sink()
        if block is None:
            return {}
        indices = sorted(ropes)  # the sink is stored for all layers of the model
        own = MemoryBlock(*(tensor[indices][:, heads] for tensor in (block.keys, block.values, block.positions)))
        placed = place_sink(own, [ropes[index] for index in indices], self.bank.spec.reference_tokens)
        if not bool(placed.keys.to(dtype).isfinite().all() and placed.values.to(dtype).isfinite().all()):
            raise ConfigError(
                f"mem_triton.memory.bank: its constant prefix has numbers beyond {dtype}; serve another dtype"
            )
        first, end = self.tables.sink_first, self.tables.sink_end
        return {
            index: SharedSegment(placed.keys[i].to(device, dtype), placed.values[i].to(device, dtype), first, end)
            for i, index in enumerate(indices)
        }

    def segments(self, layer: int) -> LayerMemory | None:
        return self._layers.get(layer)

    def load_pages(self, orders: list[PageLoad]) -> None:
        """Start to fill pages in the background, behind the steps that are queued."""
        with self._host.exclusive():
            for ref, pages, _ in orders:
                self.load(ref, pages, wait=not self._host.leaves_promptly)

    def pages_state(self, heard: list[str]) -> dict[str, dict[str, Any]]:
        """What has been filled, less what the front end has ``heard``: reference -> None, or why it could not be; and
        the loader's counts."""
        return {"finished": self.loader.outcomes(heard), "stats": self.loader.stats()}

    def capture_state(self, lease: str) -> dict[str, Any]:
        """{"file": path} of this rank's part of a kept prompt, {"error": reason}, {} while it is written."""
        try:
            with self._host.exclusive():
                return self.captures.state(lease)
        except KeyError as error:
            return {"error": str(error)}

    def drop_captures(self, leases: list[str]) -> None:
        """Forget captures; nothing of them stays here or on the disk."""
        with self._host.exclusive():
            self.captures.drop(leases)

    def describe(self) -> str:
        """One line for the log."""
        layout, spec = self.layout, self.bank.spec
        return (
            f"bank {self.bank.path} ({spec.kind}), {len(self.captures.ropes)} memory layer(s) here, {layout.num_pages} "
            f"pages of {layout.page_tokens} tokens ({self.pool.nbytes / GIB:.2f} GiB), {layout.dtype}"
        )

    def load(self, ref: str, pages: Sequence[int], wait: bool = False) -> None:
        """Start to fill pages with an entry.

        The front end gives pages away when a request is over for it. wait: until the requests of the batch that read
        them have left, for engines that may run a request a little longer and say at once when it leaves. Else such a
        request has left already, or fails in the next step.
        """
        readers = self.tables.readers(pages)
        if readers and wait:
            self._held_back.append((ref, tuple(pages)))
            return
        for request_id in readers:
            self.tables.leave(request_id)
            self._given_away.add(request_id)
        self._held |= dict.fromkeys(pages, ref)
        self.loader.load(ref, pages)

    def enter(self, request_id: str, payload: SystemPayload) -> None:
        """A request joins the batch. Raises RuntimeError if its pages were given away in the meantime."""
        for ref, run in payload.pages.items():
            if any(self._held.get(page) != ref for page in run.pages):
                raise RuntimeError(f"the pages of {ref} hold something else by now")
        self.tables.enter(request_id, payload.plan, payload.pages)
        self.captures.enter(request_id, payload.capture)

    def leave(self, request_id: str) -> None:
        """A request is about to leave the batch; its KV is still its own."""
        self.tables.leave(request_id)
        self._given_away.discard(request_id)
        self._load_held_back()
        self.captures.leave(request_id)

    def begin_step(self, step: StepBatch) -> dict[str, Exception]:
        gone = self._given_away.intersection(step.request_ids)
        faults: dict[str, Exception] = {id: RuntimeError("its pages hold something else by now") for id in gone}
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
        self._given_away.discard(request_id)
        self._load_held_back()
        self.captures.drop_request(request_id)

    def _load_held_back(self) -> None:
        held_back, self._held_back = self._held_back, []
        for ref, pages in held_back:
            self.load(ref, pages, wait=True)


def _heads(total: int, here: int, rank: int, ranks: int) -> slice:
    """A tensor-parallel rank's KV heads. Ranks beyond the number of heads repeat them, as engines do."""
    first = rank * here if ranks <= total else rank * total // ranks
    return slice(first, first + here)
