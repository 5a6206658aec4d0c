"""Holds calls to workers back while an engine sleeps: the device memory that a call would touch is not there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

SHUT_SECONDS = 60.0
"""Seconds that an engine which is to sleep waits for the calls that are under way."""


class Gate:
    """Calls pass while it is open, and wait while it is shut. Example::

    answer = await gate.through(client.call, "take_state")
    await gate.shut()                     # once nothing is under way any more
    with gate.reopened():
        engine.sleep()
    ...
    gate.open()
    """

    def __init__(self) -> None:
        self._inside, self._is_shut = 0, False
        self._changed = asyncio.Event()

    async def through(self, call: Any, *args: Any) -> Any:
        """``await call(*args)``, as soon as the gate is open."""
        await self._until(lambda: not self._is_shut)
        self._inside += 1
        try:
            answer: Awaitable[Any] = call(*args)
            return await answer
        finally:
            self._inside -= 1
            self._change()

    async def shut(self, seconds: float = SHUT_SECONDS) -> None:
        """Let nothing through, and wait for what is inside. Raises TimeoutError, with the gate open again."""
        self._is_shut = True
        try:
            await asyncio.wait_for(self._until(lambda: not self._inside), seconds)
        except BaseException:
            self.open()
            raise

    @contextlib.contextmanager
    def reopened(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Close the gate while an engine goes to sleep, and open it again if that raises.

        unless: whether the engine sleeps all the same, because a part of it did before.
        """
        try:
            yield
        except BaseException:
            if not unless():
                self.open()
            raise

    def open(self) -> None:
        """Let calls through again; harmless if they are."""
        self._is_shut = False
        self._change()

    async def _until(self, is_so: Any) -> None:
        while not is_so():
            await self._changed.wait()

    def _change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
