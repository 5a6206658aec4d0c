"""What an asyncio engine awaits for a request's memory: filled pages before it runs, commits and captures after it.

The engine hands in how its workers are called; all of it runs in the event loop that serves the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mem_triton.runtime.courier import PageCourier
from mem_triton.runtime.front.explicit import Reading
from mem_triton.runtime.front.memory import MemoryFrontEnd, MemoryLoadError, Opened

POLL_SECONDS = 0.002

Call = Callable[..., Awaitable[list[Any]]]
"""call(method, *args) -> one answer a worker."""
Alive = Callable[[], Awaitable[None]]
"""Raises what ends a wait: the client has hung up, or the request was aborted."""


async def _always() -> None: ...


class AsyncMemory:
    """Waits on behalf of requests; one per engine front end. Closing what was opened stays with the engine."""

    def __init__(self, memory: MemoryFrontEnd, call: Call) -> None:
        self.memory, self._call = memory, call
        self._courier = PageCourier(memory.explicit.residency) if memory.explicit is not None else None
        self._carrying = asyncio.Lock()

    async def claim(self, reading: Reading, prompt_ids: Sequence[int]) -> None:
        """Complete the plan and pin its pages. Raises RequestError if it never fits."""
        explicit = self.memory.explicit
        await asyncio.to_thread(explicit.retrieve, reading, prompt_ids)
        explicit.claim(reading)

    async def refresh(self, reading: Reading, prompt_tokens: int, generated: Sequence[int]) -> None:
        """New references for what was just said, if there are any and they fit."""
        await asyncio.to_thread(self.memory.explicit.refresh, reading, prompt_tokens, generated)

    async def fill(self, reading: Reading, alive: Alive = _always) -> None:
        """Wait until every page that the request reads is filled; others go on meanwhile. Raises MemoryLoadError.

        alive: looked at in every round.
        """
        while pending := reading.pending:
            if failure := next((t.state for t in pending if t.state.startswith("failed")), None):
                raise MemoryLoadError(failure)
            await alive()
            if self._carrying.locked():
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self._carry_pages()

    async def _carry_pages(self) -> None:
        """One round of orders and answers; one task at a time does it for all."""
        async with self._carrying:
            if orders := self._courier.orders():
                await self._call("load_pages", orders)
            if self._courier.busy:
                self._courier.settle(await self._call("pages_state"))
        await asyncio.sleep(POLL_SECONDS)

    async def end(self, opened: Opened, prompt_tokens: int, generated: int, normal: bool) -> None:
        """Keep what the request asked to keep, unpin its pages, commit its session. normal: neither aborted nor failed.

        The next request finds the session free when this returns. What fails leaves ``opened`` to be closed.
        """
        reading, lease, sessions = opened.reading, opened.lease, self.memory.sessions
        if reading is not None:
            if reading.capture is not None and normal:
                await asyncio.to_thread(self.memory.explicit.keep, reading, await self._captured(reading))
            self.memory.explicit.close(reading)
        if not (normal and lease is not None and sessions.writes(lease)):
            self.memory.close(opened)
            return
        arguments = sessions.take_arguments(lease, prompt_tokens, generated)
        parts = await self._call("take_state", *arguments)
        opened.lease = None  # the commit closes it, even when the caller is gone before it is written
        await asyncio.shield(asyncio.to_thread(sessions.commit, lease, arguments[1], parts))

    async def _captured(self, reading: Reading) -> list[dict[str, Any]]:
        files: dict[int, dict[str, Any]] = {}
        while True:
            answers = await self._call("capture_state", reading.capture["lease"])
            files |= {rank: answer for rank, answer in enumerate(answers) if answer}
            if len(files) == len(answers):
                return list(files.values())
            await asyncio.sleep(POLL_SECONDS)
