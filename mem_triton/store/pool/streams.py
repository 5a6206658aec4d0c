"""Orders copies into pages: after the steps that still read what lay there, before those that read them next.

A step is queued on a GPU long before it runs. Two orders keep pages and steps apart, and neither makes a step's thread
wait. A copy waits, on its own stream, for the *marks* that were left when the pages were released. A step's stream
waits for the copies that a background thread has already seen finished, which costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class HostCopies:
    """On the CPU steps have run when they return: there is nothing to order."""

    def mark(self) -> Any:
        """What a later copy has to wait for if it overwrites what the steps queued so far read."""
        return None

    def run(self, copy: Callable[[], None], after: Iterable[Any]) -> Any:
        """Do ``copy`` behind the marks ``after``, wait in this thread until it is done, and return a mark of that."""
        copy()
        return None

    def join(self, copies: Iterable[Any]) -> None:
        """Order the current stream behind finished copies, without waiting in this thread."""


class GpuCopies(HostCopies):
    """Copies on a stream of their own. ``mark`` and ``join`` mean the stream that is current where they are called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def run(self, copy: Callable[[], None], after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        done = torch.cuda.Event(blocking=True)  # the thread sleeps, and gives the interpreter to others
        with torch.cuda.stream(self._stream):
            for mark in after:
                self._stream.wait_event(mark)
            copy()
            done.record(self._stream)
        done.synchronize()
        return done

    def join(self, copies: Iterable[torch.cuda.Event]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for done in copies:
            stream.wait_event(done)


def copies_for(device: torch.device) -> HostCopies:
    """The order that a pool on ``device`` needs."""
    return GpuCopies(device) if device.type == "cuda" else HostCopies()
