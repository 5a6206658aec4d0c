"""Searches a bank on behalf of requests: in threads of their own, each with a deadline.

An embedder may be an endpoint that is down or does not answer. Then a request is answered without references and says
so; it takes no thread from commits and captures, and requests that search nothing never notice.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mem_triton import metrics
from mem_triton.store.errors import EmbedderError
from mem_triton.store.pool.plan import Attachment

SEARCH_SECONDS = 10.0
"""Seconds that a request waits for its references."""
THREADS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a search gave. plan: references; failure: why there are none, in words that a client may read."""

    plan: tuple[Attachment, ...] = ()
    failure: str | None = None


class Searches:
    """A bounded pool of search threads. A thread is lost to it until its search returns.

    While all threads hang, searches fail at once instead of queueing behind them.

    Example::

        found = await searches.outcome(retriever.plan, prompt_ids)       # never raises
    """

    def __init__(self, deadline: float = SEARCH_SECONDS, threads: int = THREADS) -> None:
        self.deadline, self._threads = deadline, threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mem_triton-search")
        self._hanging: set[Future[Any]] = set()
        self._lock = threading.Lock()

    async def outcome(self, search: Callable[..., tuple[Attachment, ...]], *args: Any) -> Found:
        """The result of ``search(*args)``, within the deadline."""
        if (future := self._submit(search, *args)) is None:
            return self._failed("timeout", "earlier searches still hang")
        try:
            return Found(await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self.deadline))
        except TimeoutError as error:
            return self._late(future, error)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:
            return self._broken(error)

    def _submit(self, search: Callable[..., tuple[Attachment, ...]], *args: Any) -> Future[Any] | None:
        with self._lock:
            if len(self._hanging) >= self._threads:
                return None
        return self._executor.submit(search, *args)

    def _late(self, future: Future[Any], error: BaseException) -> Found:
        if future.done() and not future.cancelled():  # the search itself timed out
            return self._broken(error)
        if not future.cancel():
            with self._lock:
                self._hanging.add(future)
            future.add_done_callback(self._returned)
        return self._failed("timeout", f"the search took longer than {self.deadline:g} s")

    def _returned(self, future: Future[Any]) -> None:
        with self._lock:
            self._hanging.discard(future)

    def _broken(self, error: BaseException) -> Found:
        kind = "embedder" if isinstance(error, EmbedderError) else "bank"
        what = "the embedder cannot be reached" if kind == "embedder" else "the bank cannot be searched"
        return self._failed(kind, what, error)

    def _failed(self, kind: str, failure: str, error: BaseException | None = None) -> Found:
        metrics.SEARCH_FAILURES.labels(kind).inc()
        logger.warning("a request is answered without references: %s%s", failure, f": {error}" if error else "")
        return Found(failure=failure)
