"""Runs an event loop for engines that are stepped by their caller: when it is told to, in the caller's thread.

The coroutines of a request's memory are the same for all engines. One that has no event loop runs them here, between
its own steps; no thread of its own ever touches them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

ROUNDS = 8
"""Rounds of a run: a chain of that many wake-ups is done in one of them."""
PAUSE_SECONDS = 0.001


class SteppedLoop:
    """Example::

    loop = SteppedLoop()
    task = loop.spawn(serve(request))
    while not task.done():
        engine.step()
        loop.run()
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin with the next run."""
        return self._loop.create_task(work)

    def run(self) -> None:
        """Let every task go on until it waits for something else than others; the caller may have a loop of its own."""
        callers = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            self._loop.call_soon(self._stop_after, ROUNDS - 1)
            self._loop.run_forever()
        finally:
            asyncio._set_running_loop(callers)

    def _stop_after(self, rounds: int) -> None:
        if rounds:
            self._loop.call_soon(self._stop_after, rounds - 1)
        else:
            self._loop.stop()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run until ``done``, with pauses for what threads do."""
        self.run()
        while not done():
            time.sleep(PAUSE_SECONDS)
            self.run()
