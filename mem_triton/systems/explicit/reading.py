"""Holds one request's explicit memory, and what its answer says of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton.store.pool.residency import Ticket
from mem_triton.systems.base import RequestMemory
from mem_triton.systems.explicit.captures import Capture
from mem_triton.systems.explicit.head import is_head
from mem_triton.systems.explicit.request import ReadingRequest


@dataclass(eq=False)
class Reading(RequestMemory):
    """One request's explicit memory, from its fields to its plan."""

    request: ReadingRequest
    plan: tuple[Attachment, ...] = ()
    top_k: int = 0  # references a chunk, 0: no retrieval
    refreshes: bool = False
    note: str | None = None  # why references are not refreshed
    retrieval_note: str | None = None  # why there are fewer references than asked for, or none
    tokens: dict[str, int] = field(default_factory=dict)  # of every reference of the plan
    prompt_tokens: int = 0
    head_note: str | None = None  # why the prompt's own head is read, too
    context_note: str | None = None  # why the answer may have fewer tokens than asked for
    trained_note: str | None = None  # of several entries that were trained apart
    closed: bool = False
    capture: Capture | None = None
    tickets: list[Ticket] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def pending(self) -> list[Ticket]:
        """Claims whose pages are not filled yet."""
        return [t for t in self.tickets if t.state != "ready"]

    def report(self) -> dict[str, Any]:
        """What every part of the text saw, for the person who asked: ids, positions and scores."""
        spans: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for a in self.plan:
            if is_head(a.ref):
                continue
            entry = {"id": a.ref} if a.score is None else {"id": a.ref, "score": round(a.score, 4)}
            spans.setdefault((a.first, a.end), []).append(entry)
        report: dict[str, Any] = {
            "references": [
                {"first_token": first, "end_token": None if end == FOREVER else end, "entries": entries}
                for (first, end), entries in sorted(spans.items())
            ]
        }
        if self.retrieval_note:
            report["retrieval"] = self.retrieval_note
        if self.head_note:
            report["head"] = self.head_note
        if self.context_note:
            report["context"] = self.context_note
        if self.trained_note:
            report["trained"] = self.trained_note
        if self.note:
            report["refresh"] = f"off: {self.note}"
        if self.capture is not None:
            report["capture"] = self.capture.report()
        return report
