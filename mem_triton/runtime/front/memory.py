"""The front end of a request's memory, both kinds behind one door: words in, a lease and a reading out.

Runs where an engine takes its requests. Everything a worker needs travels with the request; what a KV cache needs to
tell memories apart becomes part of its keys. The engine's integration carries both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mem_triton.runtime.front.asked import Asked
from mem_triton.runtime.request import RequestError, parse_request
from mem_triton.runtime.sessions import Lease

if TYPE_CHECKING:
    from mem_triton.runtime.front.explicit import ExplicitFrontEnd, Reading
    from mem_triton.runtime.front.sessions import SessionFrontEnd

DELTA_WORDS = ("mem_session", "mem_write", "mem_reset")
EXPLICIT_WORDS = ("mem_ids", "mem_top_k", "mem_query", "mem_capture", "mem_tenant")


class MemoryLoadError(RuntimeError):
    """An entry's keys and values could not be read; the request that needs them fails, nothing else does."""


@dataclass
class Opened:
    """One request's memory: its lease on a session, its reading of a bank; each None where it has none."""

    lease: Lease | None = None
    reading: Reading | None = None


class MemoryFrontEnd:
    """Opens and closes the memory of each request; one per engine front end.

    Example::

        opened = memory.open(words, Asked(answers=1))        # RequestError: answer it with HTTP 400
        workers_need = memory.carried(opened)
        ...
        memory.close(opened)
    """

    def __init__(self, sessions: SessionFrontEnd | None, explicit: ExplicitFrontEnd | None) -> None:
        self.sessions, self.explicit = sessions, explicit

    def open(self, words: Mapping[str, Any] | None, asked: Asked) -> Opened:
        """Check a request's words. Raises RequestError naming the word and the fix, with nothing scheduled."""
        request = parse_request(words)
        self._check_served(words or {})
        reading = self.explicit.open(request, asked) if self.explicit is not None else None
        lease = self.sessions.open(request, asked) if self.sessions is not None else None
        return Opened(lease, reading)

    def _check_served(self, words: Mapping[str, Any]) -> None:
        """Words of a memory that this server does not have are refused, not ignored."""
        parts = ((DELTA_WORDS, self.sessions, "delta"), (EXPLICIT_WORDS, self.explicit, "memory"))
        for names, part, section in parts:
            said = next((name for name in names if name in words), None)
            if part is None and said is not None:
                raise RequestError(
                    said, f"this server is configured without mem_triton.{section}, which serves the word"
                )

    def carried(self, opened: Opened) -> dict[str, Any]:
        """What the workers and the prefix keys need of a request whose pages are filled; empty for a plain one."""
        carried = self.sessions.carried(opened.lease) if opened.lease is not None else {}
        if opened.reading is not None:
            carried |= self.explicit.carried(opened.reading)
        return carried

    def close(self, opened: Opened) -> None:
        """End a request that commits nothing more; harmless when it has ended already."""
        lease, opened.lease = opened.lease, None
        if lease is not None:
            self.sessions.abort(lease)
        if opened.reading is not None:
            self.explicit.close(opened.reading)
