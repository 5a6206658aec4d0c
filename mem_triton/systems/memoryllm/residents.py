"""Which versions lie on the device, and how they get there: the front end's view.

Rows are read into the workers' processes while steps run; keys and values are made of them between steps, a few layers
at a time where the configuration says so.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from mem_triton.store.pool.loads import PageLoads, always
from mem_triton.store.pool.residency import Residency, Ticket
from mem_triton.systems.base import Alive, Rpc
from mem_triton.systems.memoryllm.layout import PoolLayout
from mem_triton.systems.memoryllm.shape import PoolShape, PoolVersion, is_picks, picks_ref

Commit = Callable[[], Awaitable[str | None]]
"""Puts a new version on the disk; why it could not, None if it did."""


class Residents:
    """Versions in pages. layers_per_step: layers that are filled between two steps.

    Example::

        ticket = residents.claim("request-7", version)
        await residents.wait(ticket, rpc)               # MemoryLoadError if its rows cannot be had
        ...
        residents.release("request-7")
    """

    def __init__(self, layout: PoolLayout, layers_per_step: int, shape: PoolShape) -> None:
        self._layout, self._stride, self._layers = layout, layers_per_step, shape.layers
        self._long = shape.long_term
        self._residency = Residency(layout.total, layout.page.page_tokens, layout.page.page_bytes)
        self._claims: dict[str, PoolVersion] = {}  # by owner
        self._commits: dict[str, Commit] = {}  # of versions that are not on the disk yet
        self._loads: PageLoads | None = None
        self._released = asyncio.Event()

    def claim(self, owner: str, version: PoolVersion, commit: Commit | None = None, reads: bool = False) -> Ticket:
        """Keep a version on the device for ``owner``. commit: of one that is put on the disk when it has its pages.

        reads: the owner also gets pages of its own for long-term rows, by ``picks_ref``, where there are any.
        """
        if commit is not None:
            self._commits[version.ref] = commit
        self._claims[owner] = version
        long = self._long if reads else None
        own = {} if long is None else {picks_ref(owner): long.read}
        return self._residency.request(owner, {version.ref: self._layout.rows, **own})

    def release(self, owner: str) -> None:
        """The owner is done; harmless if it has no claim."""
        if self._claims.pop(owner, None) is not None:
            self._residency.release(owner, forget=[picks_ref(owner)])
            self._released.set()

    def versions(self, identity: str) -> int:
        """Count the versions of a pool that requests hold."""
        return len({version.version for version in self._claims.values() if version.identity == identity})

    async def fewer_versions(self, identity: str, most: int) -> None:
        """Wait until requests hold fewer than ``most`` versions of a pool."""
        while self.versions(identity) >= most:
            self._released.clear()
            await self._released.wait()

    async def wait(self, ticket: Ticket, rpc: Rpc, alive: Alive = always) -> None:
        """Wait until the claim's pages are filled. Raises MemoryLoadError."""
        if self._loads is None:  # one front end has one rpc
            self._loads = PageLoads(self._residency, functools.partial(self._load, rpc))
        await self._loads.wait(lambda: [] if ticket.state == "ready" else [ticket], alive)

    async def _load(self, rpc: Rpc, _: str, ref: str, pages: list[int], tokens: int) -> list[dict[str, Any]]:
        """Fill a version's pages on all workers, and return an answer for each as ``PageLoads`` takes it."""
        if is_picks(ref):  # filled by the step that runs the prompt
            return [{"error": None, "stats": {}}]
        commit = self._commits.pop(ref, None)
        error = await commit() if commit is not None else None
        error = error or _error(await rpc("fetch", ref))
        for first in range(0, self._layers, self._stride):
            if error is None:
                end = min(first + self._stride, self._layers)
                error = _error(await rpc("place", ref, list(pages), first, end))
        return [{"error": error, "stats": {}}]


def _error(answers: list[dict[str, Any]]) -> str | None:
    """Why one of the workers could not, None if all could."""
    return next((answer["error"] for answer in answers if answer["error"]), None)
