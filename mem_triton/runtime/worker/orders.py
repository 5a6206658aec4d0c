"""Calls that a worker carries out when a step brings their name: the same step on every rank.

An engine that has no calls of its own between two steps can so run what has collectives, or touches what steps read.
The front end leaves a call on every rank, over the channel; an engine request then carries its name.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mem_triton.systems.payload import decode


class Orders:
    """One worker's. call: a method that carries out (system, method, *args); it is not kept alive. Example::

    orders.leave("7", "memoryllm", "write", ids)      # over the channel
    orders.run("7")                                   # before the step that brings it
    orders.outcome("7").result()                      # over the channel
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = weakref.WeakMethod(call)
        self._left: dict[str, tuple[Any, ...]] = {}
        self._outcomes: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def leave(self, id: str, *call: Any) -> None:
        """Keep a call until a step brings its name."""
        with self._lock:
            self._left[id], self._outcomes[id] = call, Future()

    def run(self, id: str) -> None:
        """Carry a call out; nothing if it is not there, or was carried out. Never raises."""
        with self._lock:
            call, outcome = self._left.pop(id, None), self._outcomes.get(id)
        if call is None:
            return
        try:
            outcome.set_result(self._call()(*call))
        except Exception as error:
            outcome.set_exception(error)

    def outcome(self, id: str) -> Future[Any]:
        """Answered when the call has been carried out. Raises LookupError for one that was not left here."""
        return self._outcomes[id]

    def forget(self, id: str) -> None:
        """Drop a call that has been answered, or that no front end waits for."""
        with self._lock:
            self._left.pop(id, None)
            self._outcomes.pop(id, None)


def order_of(data: bytes | None) -> str | None:
    """The call that a request brings, by its encoded payload; None for none. Raises PayloadError."""
    return None if data is None else decode(data).order
