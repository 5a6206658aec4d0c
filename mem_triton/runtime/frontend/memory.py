"""The front end of a request's memory, both kinds behind one door: words in, a lease and a reading out.

Runs where an engine takes its requests. Everything a worker needs travels with the request; what a KV cache needs to
tell memories apart becomes part of its keys. The engine's integration carries both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mem_triton.runtime.frontend.tenants import Tenants
from mem_triton.runtime.incidents import Incidents
from mem_triton.systems.asked import Asked
from mem_triton.systems.delta_mem.sessions import Lease
from mem_triton.systems.request import MemoryRequest, RequestError, parse_request

if TYPE_CHECKING:
    from mem_triton.systems.delta_mem.frontend import SessionFrontEnd
    from mem_triton.systems.explicit.captures import Capture
    from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading

DELTA_WORDS = ("mem_session", "mem_write", "mem_read", "mem_reset")
EXPLICIT_WORDS = ("mem_ids", "mem_top_k", "mem_query", "mem_capture", "mem_capture_answer", "mem_replace")


class MemoryLostError(RuntimeError):
    """A worker lost the memory of a request while it ran; its answer is not what was asked for and is withheld."""


@dataclass
class Opened:
    """One request's memory: its lease on a session, its reading of a bank; each None where it has none.

    more: what its workers need besides. warnings: what went wrong after its answer was whole.
    """

    lease: Lease | None = None
    reading: Reading | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def capture(self) -> Capture | None:
        """What the request asked to keep."""
        return self.reading.capture if self.reading is not None else None

    def report(self) -> dict[str, Any] | None:
        """What the answer says of its memory; None if there is nothing to say."""
        report = self.reading.report() if self.reading is not None else {}
        if self.warnings:
            report["warnings"] = self.warnings
        return report or None


class MemoryFrontEnd:
    """Opens and closes the memory of each request; one per engine front end.

    Example::

        opened = memory.open(words, Asked(answers=1))        # RequestError: answer it with HTTP 400
        workers_need = memory.carried(opened)
        ...
        memory.close(opened)
    """

    def __init__(
        self, sessions: SessionFrontEnd | None, explicit: ExplicitFrontEnd | None, tenants: Tenants | None = None,
        incidents: Incidents | None = None,
    ) -> None:  # fmt: skip
        self.sessions, self.explicit, self.tenants = sessions, explicit, tenants or Tenants(None)
        self.incidents = incidents

    def open(self, words: Mapping[str, Any] | None, asked: Asked) -> Opened:
        """Check a request's words. Raises RequestError naming the word and the fix, with nothing scheduled."""
        request = self.tenants.bind(parse_request(words), asked.headers)
        self._check_served(words or {})
        reading = self.explicit.open(request, asked) if self.explicit is not None else None
        try:
            lease = self.sessions.open(request, asked) if self.sessions is not None else None
        except BaseException:
            self.close(Opened(None, reading))
            raise
        return Opened(lease, reading)

    def check_words(self, words: Mapping[str, Any], headers: Mapping[str, str] | None) -> None:
        """Raise the RequestError that ``open`` would because of the words alone; opens nothing."""
        request = self.tenants.bind(parse_request(words), headers)
        self._check_served(words)
        if self.explicit is not None:
            self.explicit.check(request)

    def open_capture(self, capture: Capture, ids: list[int]) -> Opened:
        """The memory of the engine request that reads what is kept: none, so that nothing but its text is kept."""
        plain = MemoryRequest(write=False)
        lease = self.sessions.open(plain, Asked()) if self.sessions is not None else None
        return Opened(lease, None, self.explicit.captures.carried(capture, ids))

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
        if "memory" in carried:
            carried["memory"]["bank"] = self._salted(carried["memory"]["bank"])
        return carried | opened.more

    def key_of(self, lease: Lease) -> str | None:
        """What a KV cache needs to tell the request's state from others; None for one that no state corrects, where
        the scope leaves plain requests to the engine: its KV is the engine's own."""
        epoch = self.incidents.epoch if self.incidents is not None else 0
        stock = self.sessions is not None and self.sessions.scope == "sessions" and self.sessions.is_plain(lease)
        return None if stock and not epoch else self._salted(lease.key)

    def _salted(self, key: str) -> str:
        """After an incident nothing that was cached before is found again: some of it lacks its memory."""
        epoch = self.incidents.epoch if self.incidents is not None else 0
        return f"{key}|{epoch}" if epoch else key

    def begin(self, request_id: str) -> None:
        """A request of this name begins: what befell an earlier one of the same name is not its own."""
        if self.incidents is not None:
            self.incidents.forget(request_id)

    def check(self, request_id: str, final: bool = False) -> None:
        """Raise MemoryLostError if a worker lost the request's memory. final: its answer is about to be handed out."""
        if self.incidents is not None and (reason := self.incidents.of(request_id, final)):
            self.incidents.forget(request_id)
            raise MemoryLostError(f"the engine lost the memory of this request ({reason}); please try again")

    def close(self, opened: Opened) -> None:
        """End a request that commits nothing more; harmless when it has ended already."""
        lease, opened.lease = opened.lease, None
        if lease is not None:
            self.sessions.abort(lease)
        if opened.reading is not None:
            self.explicit.close(opened.reading)
