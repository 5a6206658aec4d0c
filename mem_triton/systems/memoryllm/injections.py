"""Writes into pools while a server runs: one at a time into each pool, in the order in which they come.

A write reads its pool's newest version. Its rows are made by the workers between steps, checked, and put on the disk as
the next version when that has a place on the device; only then is it acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mem_triton.store.errors import BankFullError, BankLockedError
from mem_triton.store.pool.loads import MemoryLoadError
from mem_triton.systems.base import Failure, RequestMemory, Rpc
from mem_triton.systems.engine import EngineShape
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.request import PoolRequest
from mem_triton.systems.memoryllm.residents import Residents
from mem_triton.systems.memoryllm.rows import from_bytes, to_bytes
from mem_triton.systems.memoryllm.section import MemoryLLMSection
from mem_triton.systems.memoryllm.shape import PoolVersion
from mem_triton.systems.memoryllm.writing import PoolWrite
from mem_triton.systems.params import RequestParams
from mem_triton.systems.request import RequestError

SHORT = 16
"""Tokens below which a text disturbs a pool, as the authors say in their README."""
LOCK_SECONDS = 10.0
"""Seconds that a write waits for another process that writes the store."""


@dataclass(eq=False, kw_only=True)
class Injecting(RequestMemory):
    """One request that writes. version: what it has become, None before. forked: it has made its pool itself."""

    request: PoolRequest
    ids: list[int] = field(default_factory=list)
    chunks: int = 0
    version: PoolVersion | None = None
    forked: bool = False
    waits: bool = True
    unscheduled: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def report(self) -> dict[str, Any]:
        if self.version is None:
            return {}
        said: dict[str, Any] = {"id": self.version.id, "tokens": len(self.ids), "chunks": self.chunks}
        if len(self.ids) < SHORT:
            said["note"] = f"the authors advise against texts of fewer than {SHORT} tokens: they disturb the pool"
        return {"pool": said}


class Injections:
    """Checks writes and carries them out; one per engine front end."""

    def __init__(self, pools: Pools, section: MemoryLLMSection, engine: EngineShape, residents: Residents) -> None:
        self._pools, self._section, self._residents = pools, section, residents
        self._bos, self._vocabulary = engine.hf_config.get("bos_token_id"), engine.hf_config["vocab_size"]
        self._stages, self._stride = engine.pp_spans, section.layers_per_step or pools.shape.layers
        self._under_way = 0
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def check(self, request: PoolRequest) -> None:
        """Raises RequestError if the fields name what there is not, or a new pool that there is."""
        try:
            self._pools.exact(request.inject, request.tenant, own=True)
        except PoolError as error:
            if request.fork is None:
                raise RequestError("mem_inject", f"{error}; mem_fork begins a new one") from None
        else:
            if request.fork is not None:
                raise RequestError("mem_inject", f'pool "{request.inject}" is taken; mem_fork needs a new name')
        try:
            if request.fork is not None:
                self._pools.resolve(request.fork, request.tenant)
        except PoolError as error:
            raise RequestError("mem_fork", str(error)) from None

    def admit(self, request: PoolRequest, params: RequestParams) -> Injecting:
        """A request's write. Raises RequestError."""
        reasons = {
            "n: a write has one answer": params.answers != 1,
            "stop strings: a write has no tokens to stop at": params.stops,
            "a LoRA adapter: texts are written by the checkpoint's own weights": bool(params.lora),
            f"{params.unfit}: a text is tokens": params.unfit is not None,
        }
        if reason := next((reason for reason, there in reasons.items() if there), None):
            raise RequestError("mem_inject", f"does not go together with {reason}")
        self.check(request)
        return Injecting(request=request)

    def take(self, memory: Injecting, ids: Sequence[int]) -> None:
        """The text of a write. Raises RequestError for one that cannot be written."""
        if not ids:
            raise RequestError("mem_inject", "a text has at least one token")
        if self._bos is not None and ids[0] == self._bos:
            raise RequestError(
                "mem_inject",
                f"the text begins with BOS ({self._bos}), and the pool has a learned one; leave it out, as the "
                "converter's tokenizer does",
            )
        if wrong := [token for token in ids if not 0 <= token < self._vocabulary]:
            raise RequestError("mem_inject", f"{wrong[0]} is no token of the model's {self._vocabulary}")
        memory.ids = list(ids)

    async def write(self, memory: Injecting, rpc: Rpc) -> None:
        """Write a text, whole or not at all; what goes wrong is the memory's ``failure``."""
        from mem_triton import metrics  # not with this module: SGLang says where counts are kept only later

        request = memory.request
        turn = self._turns.setdefault((request.tenant, request.inject), asyncio.Lock())
        try:
            async with turn:
                await self._write(memory, rpc)
        except Exception as error:
            metrics.POOL_WRITE_FAILURES.inc()
            memory.failure = Failure(f"mem_inject: {error}; the pool is as it was", _status(error))
        else:
            metrics.POOL_WRITES.inc()

    async def _write(self, memory: Injecting, rpc: Rpc) -> None:
        request, chunk = memory.request, self._section.chunk
        self._under_way += 1
        try:
            write = await asyncio.to_thread(self._begin, memory)
            for start in range(0, len(memory.ids), chunk):
                part = memory.ids[start : start + chunk]
                new, keys = await self._new_rows(memory, part, write.tail, rpc)
                await asyncio.to_thread(write.apply, new, len(part), keys)
                memory.chunks += 1
            await self._commit(memory, write, rpc)
        finally:
            if memory.forked and memory.version is None:
                await asyncio.to_thread(self._pools.delete, request.inject, request.tenant)
            self._under_way -= 1
            if not self._under_way:  # now others may change the store
                self._pools.close()

    def _begin(self, memory: Injecting) -> PoolWrite:
        request = memory.request
        self._pools.start_writing(LOCK_SECONDS)
        if request.fork is not None:
            self._pools.fork(request.inject, request.fork, request.tenant)
            memory.forked = True
        return self._pools.begin(request.inject, request.seed, request.tenant)

    async def _new_rows(
        self, memory: Injecting, ids: list[int], tail: Tensor | None, rpc: Rpc
    ) -> tuple[Tensor, Tensor | None]:
        """The new rows [L, n, d] that the workers make of some tokens, and of M+ the retriever's keys [L, n, K].

        Pipeline stages go one after the other, each with the rows that the one before has left of the text.
        """
        shape, text, new, keys = self._pools.shape, ids, [], []
        try:
            for first, end in self._stages:
                before = None if tail is None else to_bytes(tail[first:end])
                found = await self._stage(memory.id, first, text, before, rpc)
                size, text = end - first, found["text"]
                new.append(from_bytes(found["new"], (size, -1, shape.hidden), shape.torch_dtype))
                if shape.long_term is not None:
                    keys.append(from_bytes(found["keys"], (size, -1, shape.long_term.keys), shape.torch_dtype))
        except BaseException:
            with contextlib.suppress(Exception):  # workers that cannot be asked are gone
                await rpc("write_off", memory.id)
            raise
        return torch.cat(new), torch.cat(keys) if keys else None

    async def _stage(
        self, id: str, first: int, text: list[int] | bytes, before: bytes | None, rpc: Rpc
    ) -> dict[str, Any]:
        """What the stage that begins with layer ``first`` says at its end. Raises PoolError."""
        answers = await rpc("write", id, first, text, before, self._stride)
        while True:
            if error := next((answer["error"] for answer in answers if answer["error"]), None):
                raise PoolError(f"the text could not be written: {error}")
            if not any(answer["left"] for answer in answers):
                return next(answer for answer in answers if answer["new"] is not None)
            answers = await rpc("write_on", id, self._stride)

    async def _commit(self, memory: Injecting, write: PoolWrite, rpc: Rpc) -> None:
        """Put the new version on the disk once it has a place on the device, and fill that."""
        from mem_triton import metrics

        now = self._pools.exact(memory.request.inject, memory.request.tenant, own=True)
        new = PoolVersion(now.tenant, now.name, now.identity, now.version + 1)
        failure: list[Exception] = []

        async def commit() -> str | None:
            try:
                await asyncio.to_thread(write.commit)
            except Exception as error:
                failure.append(error)
                return str(error)
            memory.version = new
            return None

        waited = self._residents.versions(now.identity) >= self._section.versions
        if waited:
            metrics.POOL_WRITER_WAITS.inc()
            await self._residents.fewer_versions(now.identity, self._section.versions)
        ticket = self._residents.claim(memory.id, new, commit)
        if ticket.state == "waiting" and not waited:
            metrics.POOL_WRITER_WAITS.inc()
        try:
            await self._residents.wait(ticket, rpc)
        except MemoryLoadError as error:
            if failure:
                raise failure[0] from None
            if memory.version is None:
                raise
            memory.warnings.append(f"{new.id} is on the disk, and will be on the device when it is read: {error}")
        finally:
            self._residents.release(memory.id)


def _status(error: Exception) -> HTTPStatus:
    if isinstance(error, BankFullError):
        return HTTPStatus.INSUFFICIENT_STORAGE
    if isinstance(error, BankLockedError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR
