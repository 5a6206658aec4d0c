"""M+'s long-term rows in a worker (arXiv 2502.00592, section 3.2): chosen in each layer by the prompts of a step.

A version's long-term rows lie as keys before RoPE and values in a tier, with the retriever's keys. Before a layer's
attention runs, a prompt of the step scores them with that layer's rows, and what it chooses is put into pages of the
request's own. These lie before the pool in every layer, so one table does for all, and later steps read them so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mem_triton.ops.reposition import RotaryEmbedding, rotate
from mem_triton.store.pool.pool import PagePool
from mem_triton.systems.base import LayerIO, StepBatch
from mem_triton.systems.memoryllm.long_term import LongTerm, LongTermRows, gather
from mem_triton.systems.memoryllm.projections import Projected, Projections
from mem_triton.systems.memoryllm.retriever import RowRetriever
from mem_triton.systems.memoryllm.section import LongTermSection
from mem_triton.systems.memoryllm.shape import PoolShape
from mem_triton.systems.memoryllm.update import UpdateStep


@dataclass
class LongTermReader:
    """A request in the batch. pages: of its own, ``ref``; prompt: its tokens; long: of the version that it reads."""

    ref: str
    pages: tuple[int, ...]
    prompt: int
    long: LongTerm


@dataclass
class Asking:
    """Rows [start, end) of the step that runs choose for a reader. seen: layers that have."""

    request_id: str
    start: int
    end: int
    reader: LongTermReader
    seen: set[int] = field(default_factory=set)


class RowChooser:
    """One rank's. layers: its layers' indices, in the order of ``pool``'s; ropes: of each.

    lose: told of an exception inside a layer, whose requests go on without memory then. Watches the layers of ``io``
    from now on. Raises ConfigError where these cannot be watched.
    """

    def __init__(
        self,
        shape: PoolShape,
        section: LongTermSection,
        layers: Sequence[int],
        io: LayerIO,
        retriever: RowRetriever,
        projections: Projections,
        ropes: Mapping[int, RotaryEmbedding],
        pool: PagePool,
        lose: Callable[[BaseException, bool], None],
    ) -> None:
        self._shape, self._layers, self._io, self._retriever = shape, tuple(layers), io, retriever
        self._projections, self._ropes, self._pool, self._lose = projections, ropes, pool, lose
        self._device = torch.device(pool.device)
        self._keys_at = self._device if section.device_keys else torch.device("cpu")
        self._tier = self._device if section.tier == "device" else torch.device("cpu")
        self._parts = section.selection == "chunk"
        self._readers: dict[str, LongTermReader] = {}
        self._chosen: dict[str, tuple[int, ...]] = {}  # pages of what has been chosen, by reference
        self._asking: list[Asking] = []
        for layer in self._layers:
            io.watch(layer, lambda normed, layer=layer: self._seen(layer, normed))

    # Versions.

    def begun(self, long: LongTerm) -> LongTerm:
        """A version's as the store has it, to be filled layer by layer by ``project``."""
        return replace(long, keys=long.keys.to(self._keys_at))

    def project(self, layer: int, rows: Sequence[LongTermRows]) -> tuple[LongTermRows, ...]:
        """Hidden rows of a layer of this rank as keys and values."""
        return tuple(
            replace(part, content=self._kept(self._projections.rows(layer, part.content[0])), keys=self._at(part.keys))
            for part in rows
        )

    def whole(self, long: LongTerm, made: Mapping[int, tuple[LongTermRows, ...]]) -> LongTerm:
        """A version of rows that ``project`` has made of each layer of this rank."""
        merged, fresh = [], []
        for layer, old in enumerate(long.merged):
            found = made.get(layer) or tuple(self._without_content(part) for part in long.rows(layer))
            merged.append(found[: len(old)])
            fresh.append(found[len(old) :])
        return replace(long, merged=tuple(merged), fresh=tuple(fresh))

    def after(self, long: LongTerm, steps: Sequence[UpdateStep], gone: Mapping[int, Sequence[Projected]]) -> LongTerm:
        """The version that steps make of one. gone: of each layer of this rank, what each step has dropped."""
        for i, step in enumerate(steps):
            nothing = (torch.empty(step.dropped.shape[1], 0),)
            contents = [self._kept(gone[layer][i]) if layer in gone else nothing for layer in range(self._shape.layers)]
            long = long.dropping(step.dropped, contents, step.keys, self._shape.long_term)
        return long

    def _kept(self, made: Projected) -> tuple[Tensor, ...]:
        return tuple(part.transpose(0, 1).to(self._tier).contiguous() for part in made)

    def _at(self, keys: Tensor) -> Tensor:
        return keys.to(self._keys_at)

    def _without_content(self, part: LongTermRows) -> LongTermRows:
        return replace(part, content=(torch.empty(len(part), 0),), keys=part.keys[:, :0])

    def keys_of(self, layer: int, new: Tensor) -> Tensor:
        """The retriever's keys [n, K] of a layer's new rows [n, d]."""
        return self._retriever.keys(layer, self._io.normed(layer, new))

    # Steps.

    def enter(self, request_id: str, reader: LongTermReader) -> None:
        """A request joins the batch; what it has chosen before it was preempted is still in its pages."""
        if reader.ref not in self._chosen:  # whatever was chosen into these pages is not there any more
            mine = set(reader.pages)
            self._chosen = {ref: pages for ref, pages in self._chosen.items() if mine.isdisjoint(pages)}
        self._readers[request_id] = reader

    def leave(self, request_id: str) -> None:
        """A request leaves the batch; harmless for one that reads nothing."""
        self._readers.pop(request_id, None)

    def given_away(self, pages: Sequence[int]) -> None:
        """These pages hold something else from now on."""
        gone = set(pages)
        self._chosen = {ref: kept for ref, kept in self._chosen.items() if gone.isdisjoint(kept)}

    def begin_step(self, step: StepBatch) -> dict[str, Exception]:
        """Which of the coming step's rows choose. Returns whose cannot, or could not in the last step, and why."""
        faults: dict[str, Exception] = {
            asking.request_id: RuntimeError("its prompt ran, and not all layers have chosen long-term rows")
            for asking in self._asking
            if len(asking.seen) < len(self._layers)
        }
        self._asking, at = [], 0
        for request_id, first, last in zip(step.request_ids, step.first, step.last, strict=True):
            start, at = at, at + int(last) - int(first) + 1
            reader = self._readers.get(request_id)
            if reader is None or reader.ref in self._chosen or request_id in faults:
                continue
            if not self._parts and not (first == 0 and last >= reader.prompt - 1):
                faults[request_id] = RuntimeError(
                    f"its prompt of {reader.prompt} tokens chooses long-term rows as a whole, and the step has those "
                    f"from {first} to {last}"
                )
                continue
            if last >= reader.prompt - 1:
                self._chosen[reader.ref] = reader.pages
            self._asking.append(Asking(request_id, start, min(at, start + reader.prompt - int(first)), reader))
        return faults

    def forget_rows(self) -> None:
        """No row of the coming step has memory."""
        self._asking = []

    def _seen(self, layer: int, normed: Tensor) -> None:
        """A layer of the step has its rows [T, d]."""
        for asking in self._asking:
            if layer not in asking.seen:
                asking.seen.add(layer)
                try:
                    self._choose(layer, asking.reader, normed[asking.start : asking.end])
                except Exception as error:
                    self._lose(error, False)

    @torch.inference_mode()
    def _choose(self, layer: int, reader: LongTermReader, normed: Tensor) -> None:
        long, read = reader.long, self._shape.long_term.read
        chosen = long.chosen(layer, self._retriever.queries(layer, normed), read)
        keys, values = (part.to(self._device).transpose(0, 1) for part in gather(long.rows(layer), chosen))
        where = torch.arange(-(self._shape.rows + read), -self._shape.rows, device=self._device)
        placed = rotate(keys, where, self._ropes[layer])
        self._pool.write_layer(self._layers.index(layer), reader.pages, placed, values)
