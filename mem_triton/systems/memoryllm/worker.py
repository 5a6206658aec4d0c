"""MemoryLLM's worker part: keys and values of versions in pages of the device, and the passes that write texts.

A version's keys and values are made by the model's own norms and projections, of its new rows alone where the version
before is known; a text's rows by its own decoder layers; both between two steps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mem_triton.ops.memory_attention import MemoryPages
from mem_triton.ops.reposition import RotaryEmbedding, rope_from_config, rotate
from mem_triton.schema import ConfigError
from mem_triton.store.pool.pages import GIB
from mem_triton.store.pool.pool import PagePool
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.base import Adapter, StepBatch, WorkerHost, WorkerPart
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.choosing import LongTermReader, RowChooser
from mem_triton.systems.memoryllm.convert import load_weights
from mem_triton.systems.memoryllm.host_tier import HeldVersion, HostTier
from mem_triton.systems.memoryllm.layout import layout_of, open_store
from mem_triton.systems.memoryllm.long_term import LongTerm, LongTermRows
from mem_triton.systems.memoryllm.projections import Projected, Projections
from mem_triton.systems.memoryllm.read_adapter import READ, factors_of
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.retriever import RowRetriever
from mem_triton.systems.memoryllm.rows import from_bytes, to_bytes
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolVersion, is_picks
from mem_triton.systems.memoryllm.update import UpdateStep
from mem_triton.systems.memoryllm.write import WritePass, WriteWeights
from mem_triton.systems.payload import SystemPayload

NOTHING = {"error": None, "left": 0, "new": None, "keys": None, "text": None}
"""What a stage answers to a call that is none of its own."""


@dataclass
class RowSource:
    """What a version is made of: what the host holds and what changed since, or all rows [L, N, d]. made: see
    ``HeldVersion``.

    long: of M+, of the version before or as the store has it; gone: what each step drops, by layer; old: all its rows.
    """

    before: HeldVersion | None
    steps: Sequence[UpdateStep]
    rows: Tensor | None = None
    made: dict[int, Projected] = field(default_factory=dict)
    long: LongTerm | None = None
    gone: dict[int, list[Projected]] = field(default_factory=dict)
    old: dict[int, tuple[LongTermRows, ...]] = field(default_factory=dict)


class PoolLayer:
    """What one attention layer reads besides its context."""

    def __init__(self, tables: MemoryTables, pages: MemoryPages) -> None:
        self._tables, self._pages = tables, pages

    def read(self, rows: int) -> dict[str, Any]:
        """What ``memory_attention`` takes besides the context, for a batch of ``rows`` rows, padding included."""
        return {"row_slot": self._tables.row_slot[:rows], "pages": self._pages, "table": self._tables.table}


class PoolWorker(WorkerPart):
    """One rank's. tables: which version each row reads. pool: pages of keys and values of this rank's layers."""

    def __init__(self, engine: EngineShape, section: MemoryLLMSection, host: WorkerHost) -> None:
        self.calls = {
            "fetch": self.fetch,
            "place": self.place,
            "write": self.write,
            "write_on": self.write_on,
            "write_off": self.write_off,
        }
        self._host, self._dtype = host, engine.dtype
        self.pools = open_store(engine, section)
        self.pools.kept = 0  # rows are read once, and are not needed any more when a version is placed
        self._shape, self.layout = self.pools.shape, layout_of(engine, section, self.pools.shape)
        if self._shape.layers != sum(end - first for first, end in engine.pp_spans):
            raise ConfigError(f"mem_triton.memoryllm.pools: has {self._shape.layers} layers, the model another number")
        self._layers = tuple(host.layers)
        self._io = host.layer_io()
        self._ropes = {index: rope_from_config(engine.hf_config, index) for index in self._layers}
        self._weights, self._factors, reading = self._load_weights()
        page, pages = self.layout.page, self.layout.pages + self.layout.picks
        self.tables = MemoryTables(engine.max_requests, pages, page.page_tokens, host.device)
        self.pool = PagePool(
            len(self._layers),
            page.kv_heads,
            page.head_dim,
            page.page_tokens,
            self.layout.total,
            page.dtype,
            host.device,
        )
        self._read = {index: PoolLayer(self.tables, self.pool.layer(place)) for place, index in enumerate(self._layers)}
        self._held: dict[int, str] = {}  # page -> the version that lies there
        block = self._shape.tokens
        self._projections = Projections(self._io, self._weights.bos, block, host.device, engine.dtype, reading)
        self._sources: dict[str, RowSource] = {}  # of versions that are being placed
        self.tier = HostTier(int(section.host_gib * GIB))
        self._lock = threading.Lock()
        self._writes: dict[str, WritePass] = {}
        self._long: dict[str, LongTerm] = {}  # of versions on the device, by their references
        self._chooser: RowChooser | None = None
        if self._shape.long_term is not None:
            self._chooser = RowChooser(
                self._shape,
                section.ltm,
                self._layers,
                self._io,
                self._load_retriever(str(engine.hf_config.get("hidden_act"))),
                self._projections,
                self._ropes,
                self.pool,
                host.lose,
            )

    def _load_weights(self) -> tuple[WriteWeights, dict[int, Adapter], dict[int, Adapter]]:
        """Embeddings, and what writing and reading add to the served weights, by layer. Raises ConfigError."""
        try:
            extra = load_weights(self.pools.path)
        except PoolError as error:
            raise ConfigError(f"mem_triton.memoryllm.pools: {error}") from None
        self._extra, kind = extra, {"device": self._host.device, "dtype": self._dtype}
        bos = extra["bos_embedding"].to(**kind) if self._shape.bos else None
        uses: dict[str, dict[int, Adapter]] = {"write": {}, READ: {}}
        for use, factors in uses.items():
            for name, (down, up) in factors_of(extra, use).items():
                _, _, layer, linear = name.split(".", 3)  # model.layers.3.self_attn.q_proj
                factors.setdefault(int(layer), {})[linear] = down.to(**kind), up.to(**kind)
        return WriteWeights(bos, extra["new_memory_positional_emb"].flatten().to(**kind)), uses["write"], uses[READ]

    def _load_retriever(self, act: str) -> RowRetriever:
        try:
            return RowRetriever(self._extra, self._shape.layers, act, self._host.device, self._dtype)
        except PoolError as error:
            raise ConfigError(f"mem_triton.memoryllm.pools: {error}") from None

    # What the front end calls.

    def fetch(self, ref: str) -> dict[str, Any]:
        """Read a version's rows into this process, while steps run: {"error": None or why they could not be}."""
        version = PoolVersion.of(ref)
        try:
            source = self._source(version, self.tier.get(version.identity))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        with self._lock:
            self._sources[ref] = source
        return {"error": None}

    def _source(self, version: PoolVersion, before: HeldVersion | None) -> RowSource:
        """What the workers make a version of: as little as has to be read. Raises PoolError."""
        if before is not None and before.version <= version.version:
            with contextlib.suppress(PoolError):  # the store was compacted in between
                return RowSource(before, self.pools.changes(version, before.version), long=before.long)
        state = self.pools.state_of(version)
        long = None if self._chooser is None else self._chooser.begun(state.long_term)
        return RowSource(None, (), state.rows, long=long)

    def place(self, ref: str, pages: list[int], first: int, end: int) -> dict[str, Any]:
        """Fill a version's pages in the layers [first, end), between two steps: {"error": None or why not}.

        Steps that were planned before read what lay there before; none that is planned later may read it.
        """
        try:
            self._held |= dict.fromkeys(pages, ref)
            source = self._sources[ref]
            if self._chooser is not None:
                self._chooser.given_away(pages)
            with torch.inference_mode():
                for place, layer in enumerate(self._layers):
                    if first <= layer < end:
                        keys, values = self._keys_and_values(layer, source)
                        source.made[layer] = keys.cpu(), values.cpu()
                        self.pool.write_layer(place, pages, self._placed(keys, self._ropes[layer]), values)
            if end >= self._shape.layers:
                self._remember(PoolVersion.of(ref), source)
            return {"error": None}
        except Exception as error:
            with self._lock:
                self._sources.pop(ref, None)
            for page in pages:
                self._held.pop(page, None)
            return {"error": f"{type(error).__name__}: {error}"}

    def write(self, id: str, first: int, text: list[int] | bytes, tail: bytes | None, count: int) -> dict[str, Any]:
        """Begin to write between two steps on the stage that begins with layer ``first``, through ``count`` layers.

        text: tokens, or the rows [T, d] that the stage before has left. tail: the pool's last rows [layers of the
        stage, rows of a write, d], None for a pool that has none. The answer is that of ``write_on``.
        """

        def begin() -> WritePass:
            shape, device = self._shape, self._host.device
            before = None
            if tail is not None:
                before = from_bytes(tail, (-1, shape.tokens, shape.hidden), shape.torch_dtype).to(device)
            if isinstance(text, bytes):
                rows = from_bytes(text, (-1, shape.hidden), self._dtype).to(device)
            else:
                rows = self._io.embed(text)
            return WritePass(rows, self._weights, before, shape.tokens, shape.embedding_first, first)

        return self._advance(id, begin, count) if first == self._layers[0] else dict(NOTHING)

    def write_on(self, id: str, count: int) -> dict[str, Any]:
        """Go on through ``count`` layers of the stage that writes.

        {"error", "left": its layers that are left}, and at the end {"new": its new rows, "keys": the retriever's,
        "text": the text's rows behind it, where a stage follows}.
        """
        return self._advance(id, lambda: self._writes[id], count) if id in self._writes else dict(NOTHING)

    def write_off(self, id: str) -> None:
        """Give a write up; harmless if it is over."""
        self._writes.pop(id, None)

    def _advance(self, id: str, which: Callable[[], WritePass], count: int) -> dict[str, Any]:
        try:
            with torch.inference_mode():
                write = self._writes[id] = which()
                for layer in self._layers[write.done : write.done + count]:
                    write.advance(partial(self._io.run, layer, adapter=self._factors.get(layer, {})))
                left, told = len(self._layers) - write.done, {}
                if not left:
                    del self._writes[id]
                    told = self._written(write) if self._host.tp_rank == 0 else {}
            return {**NOTHING, "left": left, **told}
        except Exception as error:
            self._writes.pop(id, None)
            return {**NOTHING, "error": f"{type(error).__name__}: {error}"}

    def _written(self, write: WritePass) -> dict[str, bytes]:
        """What the first of the ranks that split heads says of a write that has been through this stage."""
        dtype, last = self._shape.torch_dtype, self._layers[-1] + 1 == self._shape.layers
        made = write.new(last)
        told = {"new": to_bytes(made.to("cpu", dtype))}
        if self._chooser is not None:
            keys = [self._chooser.keys_of(layer, part) for layer, part in zip(self._layers, made, strict=True)]
            told["keys"] = to_bytes(torch.stack(keys).to("cpu", dtype))
        return told if last else told | {"text": to_bytes(write.hidden.cpu())}

    def _keys_and_values(self, layer: int, source: RowSource) -> tuple[Tensor, Tensor]:
        """A version's keys before RoPE and its values: [Hkv, rows, D]."""
        if source.before is None:
            if self._chooser is not None:
                source.old[layer] = self._chooser.project(layer, source.long.rows(layer))
            return self._projections.whole(layer, source.rows[layer])
        gone = None if self._chooser is None else source.gone.setdefault(layer, [])
        return self._projections.after(layer, source.before.made[layer], source.steps, gone)

    def _placed(self, keys: Tensor, rope: RotaryEmbedding) -> Tensor:
        where = torch.arange(-keys.shape[1], 0, device=keys.device)
        if self._shape.long_term is not None and self._shape.bos:
            where[0] -= self._shape.long_term.read  # long-term rows stand between the first row and the pool
        return rotate(keys, where, rope)

    def _remember(self, version: PoolVersion, source: RowSource) -> None:
        """A version is placed: the one after it begins from what it has."""
        long = None
        if self._chooser is not None:
            follows = source.before is not None
            make = self._chooser.after if follows else self._chooser.whole
            long = make(source.long, source.steps, source.gone) if follows else make(source.long, source.old)
            held = set(self._held.values())
            self._long = {ref: one for ref, one in self._long.items() if ref in held} | {version.ref: long}
        with self._lock:
            del self._sources[version.ref]
        self.tier.keep(version.identity, HeldVersion(version.version, source.made, long))

    # Steps.

    def segments(self, layer: int) -> PoolLayer | None:
        return self._read.get(layer)

    def enter(self, request_id: str, payload: SystemPayload) -> None:
        """A request joins the batch. Raises RuntimeError if its pages were given away in the meantime."""
        own = next(filter(is_picks, payload.pages), None)
        for ref, run in payload.pages.items():
            if ref == own:
                self._held |= dict.fromkeys(run.pages, ref)
            if any(self._held.get(page) != ref for page in run.pages):
                raise RuntimeError(f"the pages of {ref} hold something else by now")
        if own is not None:
            version = next(ref for ref in payload.pages if ref != own)
            reader = LongTermReader(own, tuple(payload.pages[own].pages), payload.prompt, self._long[version])
            self._chooser.enter(request_id, reader)
        self.tables.enter(request_id, payload.plan, payload.pages)

    def leave(self, request_id: str) -> None:
        if self._chooser is not None:
            self._chooser.leave(request_id)
        self.tables.leave(request_id)

    def begin_step(self, step: StepBatch) -> dict[str, Exception]:
        faults = {} if self._chooser is None else self._chooser.begin_step(step)
        self.tables.set_rows(step.request_ids, step.first, step.last, faults)
        return faults

    def forget_rows(self) -> None:
        if self._chooser is not None:
            self._chooser.forget_rows()
        self.tables.forget_rows()

    def drop_request(self, request_id: str) -> None:
        self.leave(request_id)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request in the batch reads a pool."""
        return request_id in self.tables

    def describe(self) -> str:
        return f"pools {self.pools.path}: {self.layout.describe()}"
