"""A front end without an engine: its parts are handed in, and its calls to workers go where a test wants them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mem_triton.runtime.frontend.memory import MemoryFrontEnd, Opened
from mem_triton.systems.base import Alive, FrontendPart, Outcome
from mem_triton.systems.explicit.frontend import Reading


def front_end(
    sessions: FrontendPart | None = None,
    explicit: FrontendPart | None = None,
    call: Callable[..., Awaitable[list[Any]]] | None = None,
    **more: Any,
) -> MemoryFrontEnd:
    """call: (method, *args), whichever system calls."""

    async def of_any(system: str, method: str, *args: Any) -> list[Any]:
        return await call(method, *args)

    parts = {"delta": sessions, "memory": explicit}
    return MemoryFrontEnd({n: p for n, p in parts.items() if p is not None}, call=call and of_any, **more)


async def end(memory: MemoryFrontEnd, opened: Opened, prompt_tokens: int, generated: int, normal: bool = True) -> None:
    """End a request of which nothing is to be kept."""
    await memory.end(opened, Outcome(normal, prompt_tokens, generated))


class Waits:
    """The awaits of one reading at a time."""

    def __init__(self, memory: MemoryFrontEnd) -> None:
        self.memory = memory

    async def claim(self, reading: Reading, prompt_ids: Sequence[int]) -> None:
        await self.memory.prepare(Opened({"memory": reading}), prompt_ids)

    async def fill(self, reading: Reading, *alive: Alive) -> None:
        await self.memory.ready(Opened({"memory": reading}), *alive)

    async def refresh(self, reading: Reading, prompt_tokens: int, generated: Sequence[int]) -> None:
        await self.memory.advance(Opened({"memory": reading}), prompt_tokens, generated)
