"""What happened in a run, as versioned JSON that replays to the same bytes (fact D2).

A trace holds question, settings and the events in their order; calls, replies and result follow from them, are written
beside them for readers, and are compared when it is read back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mem_triton.store.files import write_durably
from mem_triton.systems.memo.protocol import machine
from mem_triton.systems.memo.protocol.settings import Settings
from mem_triton.systems.memo.protocol.state import Call, Elapsed, Event, Failed, Replied, Result, State
from mem_triton.systems.request import RequestError

FORMAT, VERSION = "mem_triton.memo.trace", 1
_KINDS: dict[str, type[Event]] = {"replied": Replied, "failed": Failed, "elapsed": Elapsed}
LONGEST_FILE = 256 * 2**20


class TraceError(ValueError):
    """A file that is no trace, of another version, or damaged; the message names it and what is wrong."""


@dataclass(frozen=True)
class Trace:
    """A run: question, settings, and its events in their order."""

    question: str
    settings: Settings
    events: tuple[Event, ...]

    def steps(self) -> Iterator[tuple[State, list[Call], Event | None]]:
        """Run the protocol again on the events: each step's state, the calls that it requests, and its event."""
        state, calls = machine.start(self.question, self.settings)
        yield state, calls, None
        for event in self.events:
            state, calls = machine.advance(state, event)
            yield state, calls, event

    @property
    def final(self) -> State:
        """The state at the end."""
        *_, (state, _, _) = self.steps()
        return state

    @property
    def result(self) -> Result:
        """How the run ended. Raises TraceError for events that do not end it."""
        if (result := self.final.result) is None:
            raise TraceError("the trace ends before its run does")
        return result

    def without_times(self) -> Trace:
        """The same run as if every call took no time, events in the order of their calls: equal for equal replies."""
        kept = [event for event in self.events if not isinstance(event, Elapsed)]
        kept.sort(key=lambda event: (event.id, event.attempt))
        return replace(self, events=tuple(replace(event, at=0.0) for event in kept))

    def document(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        calls: dict[tuple[int, int], dict[str, Any]] = {}
        steps = list(self.steps())
        for _, wanted, event in steps:
            at = event.at if event is not None else 0.0
            for call in wanted:
                calls[call.id, call.attempt] = _call(call, at)
            if isinstance(event, (Replied, Failed)) and (told := calls.get((event.id, event.attempt))) is not None:
                told |= _end(event, told["started_ms"])
        state = steps[-1][0]
        used = set(state.result.evidence) if state.result is not None else set()
        return {
            "format": FORMAT,
            "version": VERSION,
            "question": self.question,
            "settings": self.settings.model_dump(mode="json"),
            "events": [_event(event) for event in self.events],
            "calls": list(calls.values()),
            "replies": [asdict(item) | {"used": item.number in used} for item in state.evidence],
            "candidates": {"ranked": state.candidates.ranked(), "eliminated": list(state.candidates.eliminated)},
            "entity": state.entity,
            "notes": list(state.notes),
            "spent": asdict(state.spent),
            "result": asdict(state.result) if state.result is not None else None,
        }

    def to_bytes(self) -> bytes:
        """The file's bytes; the same for the same events."""
        return json.dumps(self.document(), ensure_ascii=False, indent=1).encode("utf-8", "replace") + b"\n"

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        data = self.to_bytes()
        write_durably(path, lambda temporary: temporary.write_bytes(data) and None)


def read(path: Path) -> Trace:
    """Read a file and replay it. Raises TraceError naming the file and what is wrong with it."""
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise TraceError(f"{path}: longer than {LONGEST_FILE} bytes, so no trace")
        data = path.read_bytes()
        said = json.loads(data)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not JSON: {error}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise TraceError(f'{path}: not a trace of MeMo (its "format" is not "{FORMAT}")')
    if said.get("version") != VERSION:
        raise TraceError(f"{path}: version {said.get('version')!r}; this mem_triton reads version {VERSION}")
    try:
        trace = Trace(said["question"], Settings.model_validate(said["settings"]), tuple(map(_read, said["events"])))
        replayed = trace.to_bytes()
    except (LookupError, TypeError, ValidationError, RequestError, AttributeError) as error:
        raise TraceError(f"{path}: damaged: {' '.join(str(error).split())[:300]}") from None
    if replayed != data:
        raise TraceError(f"{path}: its events replay to another run; it was changed, or written by another mem_triton")
    return trace


def _event(event: Event) -> dict[str, Any]:
    kind = next(name for name, kind in _KINDS.items() if isinstance(event, kind))
    return {"kind": kind, **asdict(event)}


def _read(said: Mapping[str, Any]) -> Event:
    kind = _KINDS[said["kind"]]
    types = {"id": int, "attempt": int, "text": str, "reason": str, "at": (int, float)}
    for field in fields(kind):
        if field.name in types and not isinstance(said[field.name], types[field.name]):
            raise TypeError(f"an event's {field.name} is {said[field.name]!r}")
    return kind(**{name: value for name, value in said.items() if name != "kind"})


def _call(call: Call, at: float) -> dict[str, Any]:
    return {
        "id": call.id,
        "attempt": call.attempt,
        "to": call.to,
        "stage": str(call.stage),
        "turn": call.turn,
        "schema": call.schema,
        "messages": [asdict(message) for message in call.messages],
        "prompt_sha256": call.prompt_sha256,
        "temperature": call.temperature,
        "seed": call.seed,
        "max_tokens": call.max_tokens,
        "started_ms": round(1000 * (at + call.delay), 3),
        "outcome": "abandoned",
    }


def _end(event: Replied | Failed, started: float) -> dict[str, Any]:
    ms = {"ms": round(max(0.0, 1000 * event.at - started), 3)}
    if isinstance(event, Failed):
        return {"outcome": "failed", "reason": event.reason, **ms}
    tokens = {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.completion_tokens}
    return {"outcome": "replied", "text": event.text, **tokens, **ms}
