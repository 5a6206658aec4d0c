"""Serves a request whose references change while it answers as several engine requests; its client sees one.

After every ``every`` generated tokens new references are fetched for what was just said (Memory³, arXiv 2407.01178,
section 3). The engine gets the next tokens as a continuation of the text so far, with the references of every part.
Its prefix cache holds all of that but the last block, so nothing is computed twice, no running request waits for a
retrieval, and preemption, tensor parallelism and prefix keys see ordinary requests with ordinary plans. Its scheduler
is told that they are one answer (``place``), which keeps its turn between two of them.

Which tokens belong to which engine request is decided here; how an engine's outputs are put together is its own matter.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from mem_triton.systems.payload import Place

NORMAL_ENDS = ("stop", "length")
"""How an answer ends that was neither aborted nor failed."""


class Continuation:
    """Cuts an answer into engine requests of ``every`` tokens.

    prompt_ids: the request's own prompt; limit: tokens that the answer may have in all.

    Example::

        while not answer.done:
            fresh, reason = engine.run(answer.prompt_ids, max_tokens=answer.room)
            answer.end(fresh, reason)
            plan = extend(plan, answer.generated)
    """

    def __init__(self, prompt_ids: Sequence[int], every: int, limit: int) -> None:
        self.own_prompt, self._every, self.limit = list(prompt_ids), every, limit
        self.generated: list[int] = []
        self.done = False
        self.index = 0  # of the coming engine request
        self._answer = uuid.uuid4().hex

    @property
    def prompt_ids(self) -> list[int]:
        """The coming engine request's prompt: the text so far."""
        return self.own_prompt + self.generated

    @property
    def room(self) -> int:
        """Tokens that the coming engine request may have."""
        return min(self._every, self.limit - len(self.generated))

    @property
    def place(self) -> Place | None:
        """Describe the coming engine request to the scheduler; None where it is the whole answer."""
        goes_on = len(self.generated) + self.room < self.limit
        return Place(self._answer, self.index > 0, goes_on) if goes_on or self.index else None

    def end(self, fresh: Sequence[int], reason: str | None) -> None:
        """An engine request is over. fresh: its tokens; reason: why it ended, as the engine says."""
        cut = reason == "length" and len(fresh) == self.room  # shorter: the engine itself had no more room
        self.generated += fresh
        self.index += 1
        self.done = not cut or len(self.generated) >= self.limit
