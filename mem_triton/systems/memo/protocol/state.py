"""Holds the state of a run of the protocol, its events, and the calls that it requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from mem_triton.systems.memo.protocol.candidates import Candidates
from mem_triton.systems.memo.protocol.settings import Settings

Role = Literal["executive", "memory"]
Outcome = Literal["answer", "unknown", "failed"]


class Stage(StrEnum):
    """Where a run is."""

    GROUNDING = "grounding"
    PINNING = "pinning"
    SEEKING = "seeking"
    SYNTHESIS = "synthesis"
    DONE = "done"


@dataclass(frozen=True)
class Message:
    """A chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Call:
    """A request to make now, or after ``delay`` seconds. attempt: 1 for the first; seconds: its time-out.

    schema: name of the reply's schema, None for free text. reason: why it is a repetition. reply_tokens, prompt_tokens:
    upper bounds of what it may cost, already counted.
    """

    id: int
    attempt: int
    to: Role
    stage: Stage
    turn: int
    messages: tuple[Message, ...]
    temperature: float
    seed: int
    max_tokens: int
    prompt_tokens: int
    seconds: float
    schema: str | None = None
    delay: float = 0.0
    reasks: int = 0

    @property
    def prompt_sha256(self) -> str:
        """Digest of the messages."""
        said = json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Replied:
    """A call's reply. at: seconds since the start. tokens: as the server counts them, None where it does not."""

    id: int
    attempt: int
    text: str
    at: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Failed:
    """A call's failure. retryable: the same call may succeed. fatal: no call to this model can. wait: seconds that the
    server asks for. too_long: the prompt is longer than the model's context. sent: False if it never left."""

    id: int
    attempt: int
    reason: str
    at: float
    retryable: bool = True
    fatal: bool = False
    too_long: bool = False
    wait: float = 0.0


@dataclass(frozen=True)
class Elapsed:
    """So many seconds are over: the time of the stage that runs is up."""

    at: float


Event = Replied | Failed | Elapsed


@dataclass(frozen=True)
class Asked:
    """A sub-question of the present turn. ids: its calls, several where wordings vote."""

    question: str
    candidate: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Heard:
    """How one memory call ended. text: the answer, or why it failed."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Evidence:
    """A sub-question and how it ended. number: from 1, as the executive sees it. text: the answer, or why it failed."""

    number: int
    stage: Stage
    turn: int
    question: str
    candidate: str
    outcome: Outcome
    text: str
    calls: tuple[int, ...]


@dataclass(frozen=True)
class Spent:
    """What the run has cost so far; calls that are open count with their upper bounds."""

    executive_calls: int = 0
    memory_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """How a run ended. text: the answer, or what happened. status: of an HTTP answer. evidence: numbers of the replies
    that the answer rests on. ended_by: every budget that ran out."""

    kind: Literal["answer", "unknown", "error"]
    text: str
    justification: str = ""
    evidence: tuple[int, ...] = ()
    ended_by: tuple[str, ...] = ()
    status: int = 200


@dataclass
class State:
    """A run between two events. Everything in it is immutable; ``copy`` gives a step its own containers."""

    question: str
    settings: Settings
    stage: Stage = Stage.GROUNDING
    turn: int = 0
    spent: Spent = Spent()
    next_id: int = 1
    open: dict[int, Call] = field(default_factory=dict)
    batch: tuple[Asked, ...] = ()
    heard: dict[int, Heard] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    candidates: Candidates = field(default_factory=Candidates)
    entity: str = ""
    ended_by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    executive_replied: bool = False
    executive_failures: int = 0
    silent_turns: int = 0
    history_bytes: int = 0
    result: Result | None = None
    outbox: list[Call] = field(default_factory=list)

    def copy(self) -> State:
        """The same run with containers of its own and nothing to send."""
        return replace(self, open=dict(self.open), heard=dict(self.heard), outbox=[])

    def note(self, text: str) -> None:
        """Add a note to the trace and to the executive's next prompt."""
        self.notes = (*self.notes, f"{self.stage}, turn {self.turn}: {text}")

    def exhausted(self, budget: str) -> None:
        """Remember a budget that ran out."""
        if budget not in self.ended_by:
            self.ended_by = (*self.ended_by, budget)

    @property
    def deadline(self) -> float:
        """Seconds since the start at which the present stage must end."""
        budget = self.settings.budget
        return budget.seconds - (0 if self.stage is Stage.SYNTHESIS else budget.last_seconds)


def known(evidence: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
    """Those that were answered."""
    return tuple(item for item in evidence if item.outcome == "answer")


def usage(spent: Spent) -> Mapping[str, Any]:
    """What was spent, as OpenAI's API says it."""
    total = spent.prompt_tokens + spent.completion_tokens
    return {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": total,
    }
