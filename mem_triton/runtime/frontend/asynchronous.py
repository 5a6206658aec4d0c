"""What an asyncio engine awaits for a request's memory: filled pages before it runs, commits and captures after it.

The engine hands in how its workers are called; all of it runs in the event loop that serves the requests. A client may
leave at any ``await``: what changes state shared with others runs in tasks that belong to no client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from mem_triton.runtime.frontend.memory import MemoryFrontEnd, Opened
from mem_triton.store.pool.loads import POLL_SECONDS, Alive, Call, PageLoads, always
from mem_triton.systems.explicit.captures import Capture
from mem_triton.systems.explicit.frontend import Reading
from mem_triton.systems.explicit.searches import Found, Searches

CAPTURE_SECONDS = 60.0
"""Seconds that an answer waits for its prompt's keys and values to be written, before the capture has failed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What a request said that may be kept: its prompt's tokens, and its answer's.

    read: runs an engine request of these tokens and this memory to its end.
    """

    prompt_ids: Sequence[int]
    answer: Sequence[int]
    read: Callable[[list[int], Opened], Awaitable[None]]


class AsyncMemory:
    """Waits on behalf of requests; one per engine front end. Closing what was opened stays with the engine."""

    def __init__(self, memory: MemoryFrontEnd, call: Call) -> None:
        self.memory, self._call = memory, call
        self._loads = PageLoads(memory.explicit.residency, call) if memory.explicit is not None else None
        self._searches = Searches()
        self._owned: set[asyncio.Task[Any]] = set()

    async def claim(self, reading: Reading, prompt_ids: Sequence[int]) -> None:
        """Complete the plan and pin its pages. Raises RequestError if it never fits."""
        explicit = self.memory.explicit
        found = await self._searches.outcome(explicit.find, reading, prompt_ids) if reading.top_k else Found()
        explicit.attach(reading, prompt_ids, found)
        explicit.claim(reading)

    async def refresh(self, reading: Reading, prompt_tokens: int, generated: Sequence[int]) -> None:
        """New references for what was just said, if there are any and they fit."""
        explicit = self.memory.explicit
        found = await self._searches.outcome(explicit.find_next, reading, prompt_tokens, generated)
        explicit.refresh(reading, len(generated), found)

    async def fill(self, reading: Reading, alive: Alive = always) -> None:
        """Wait until every page that the request reads is filled; others go on meanwhile. Raises MemoryLoadError.

        alive: looked at in every round.
        """
        await self._loads.wait(lambda: reading.pending, alive)

    def start_loads(self) -> None:
        """Begin to fill what is claimed already, before anybody waits for it."""
        self._loads.start()

    async def end(
        self, opened: Opened, prompt_tokens: int, generated: int, normal: bool, said: Said | None = None
    ) -> None:
        """Unpin a request's pages, commit its session, keep what it asked to keep. normal: neither aborted nor failed.

        The next request finds the session free when this returns. A caller who leaves meanwhile changes nothing of
        it; what fails leaves ``opened`` to be closed, by the caller if he is still there. The answer is whole by now,
        so a session that cannot be committed is a warning beside it, and a capture that fails has an ``error``.
        said: what may be kept.
        """
        await self._own(self._end(opened, prompt_tokens, generated, normal, said), opened)

    async def _own(self, work: Coroutine[Any, Any, None], opened: Opened) -> None:
        """Run ``work`` to its end, whether its caller stays or not."""
        task = asyncio.create_task(work)
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                task.add_done_callback(lambda done: self._over(done, opened))
            raise

    def _over(self, task: asyncio.Task[None], opened: Opened) -> None:
        """An ending whose caller has left is over."""
        self.memory.close(opened)
        if not task.cancelled() and task.exception() is not None:
            logger.error("memory of a request whose client had left: %s", task.exception())

    async def _end(self, opened: Opened, prompt_tokens: int, generated: int, normal: bool, said: Said | None) -> None:
        capture = opened.capture if normal and said is not None else None
        if capture is None:
            return await self._commit(opened, prompt_tokens, generated, normal)
        capture.watched = True
        try:
            await self._commit(opened, prompt_tokens, generated, normal)
            await self._keep(capture, said)
        finally:
            self.memory.explicit.captures.discard(capture)

    async def _commit(self, opened: Opened, prompt_tokens: int, generated: int, normal: bool) -> None:
        reading, lease, sessions = opened.reading, opened.lease, self.memory.sessions
        commits = normal and lease is not None and sessions.writes(lease)
        if commits:
            opened.lease = None  # this task's, even when the caller closes what he opened
        try:
            if reading is not None:
                self.memory.explicit.close(reading)
            if not commits:
                self.memory.close(opened)
                return
            arguments = sessions.take_arguments(lease, prompt_tokens, generated)
            parts = await self._call("take_state", *arguments)
        except BaseException:
            opened.lease = lease
            raise
        try:
            await asyncio.to_thread(sessions.commit, lease, arguments[1], parts)
        except Exception as error:  # counted where it happened
            opened.warnings.append(sessions.not_committed(lease, error))

    async def _keep(self, capture: Capture, said: Said) -> None:
        """Make an entry of what a request said, or note why there is none; nothing stays behind in the workers."""
        captures, opened = self.memory.explicit.captures, None
        try:
            ids = captures.tokens(capture, said.prompt_ids, said.answer)
            opened = self.memory.open_capture(capture, ids)
            await said.read(ids, opened)
            await asyncio.to_thread(captures.keep, capture, ids, await self._captured(capture))
        except Exception as error:
            captures.failed(capture, error)
        finally:
            if opened is not None:
                self.memory.close(opened)
                with contextlib.suppress(Exception):  # workers that cannot be asked are gone
                    await self._call("drop_captures", [capture.lease])

    async def _captured(self, capture: Capture) -> list[dict[str, Any]]:
        """Each rank's file of a kept prompt, or its error."""
        files: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + CAPTURE_SECONDS
        while True:
            answers = await self._call("capture_state", capture.lease)
            files |= {rank: answer for rank, answer in enumerate(answers) if answer}
            if len(files) == len(answers):
                return list(files.values())
            if time.monotonic() > until:
                return [*files.values(), {"error": f"its keys and values were not written in {CAPTURE_SECONDS:.0f} s"}]
            await asyncio.sleep(POLL_SECONDS)
