"""Defines the stages of a run: what each asks, and what it does with the reply."""

from __future__ import annotations

from mem_triton.systems.memo.protocol import prompts
from mem_triton.systems.memo.protocol.asking import ask_memory, close_batch
from mem_triton.systems.memo.protocol.calls import send
from mem_triton.systems.memo.protocol.parsing import is_prose
from mem_triton.systems.memo.protocol.schemas import (
    Decision,
    FinalDecision,
    Grounding,
    Pinning,
    Reply,
    Seeking,
    SubQuestion,
    Synthesis,
)
from mem_triton.systems.memo.protocol.state import Call, Result, Stage, State, known
from mem_triton.systems.memo.protocol.unknown import kind_of

SCHEMAS: dict[str, type[Reply]] = {
    "grounding": Grounding,
    "pinning": Pinning,
    "seeking": Seeking,
    "synthesis": Synthesis,
    "decision": Decision,
    "final_decision": FinalDecision,
}
SILENT, LOST = 2, 2
"""Turns in a row in which no memory call succeeds, and executive calls in a row that fail, before the stage ends."""
UNKNOWN = "I don't know."


def begin(state: State) -> None:
    """The first call of a run."""
    if state.settings.executive_schema == "compact":
        enter(state, Stage.SEEKING)
    else:
        ask_executive(state)


def ask_executive(state: State) -> None:
    """The call of the present stage and turn; where no budget is left for it, the last stage follows."""
    settings, stage = state.settings, state.stage
    if settings.executive_schema == "compact":
        last = stage is Stage.SYNTHESIS
        messages = prompts.compact_messages(
            state.question, state.evidence, state.history_bytes, last, settings.instructed
        )
        schema = "final_decision" if last else "decision"
    else:
        messages, schema = _messages(state), str(stage)
    if send(state, "executive", messages, schema=schema) is None:
        if stage is Stage.SYNTHESIS:
            over = ", ".join(state.ended_by)
            fail(state, f"no budget is left for the last answer ({over}); the servers count more tokens than were sent")
        elif not state.evidence:
            _ask_the_question(state)
        else:
            synthesise(state)


def _messages(state: State) -> tuple[prompts.Message, ...]:
    task = {
        Stage.GROUNDING: prompts.GROUNDING,
        Stage.PINNING: prompts.PINNING,
        Stage.SEEKING: prompts.SEEKING,
        Stage.SYNTHESIS: prompts.SYNTHESIS,
    }[state.stage]
    limit = state.settings.budget
    turns = {Stage.PINNING: limit.pinning_turns, Stage.SEEKING: limit.seeking_turns}.get(state.stage, 0)
    sections: list[tuple[str, object]] = [("Entity", state.entity)]
    evidence = state.evidence
    if state.stage is Stage.SYNTHESIS:
        evidence = known(evidence)
    elif turns:
        sections += [
            ("Candidates", prompts.candidate_lines(state.candidates)),
            ("Taken out", list(state.candidates.eliminated)),
            ("Dead ends", state.candidates.dead_ends(state.settings.dead_end)[-20:]),
            ("Notes", [note[:300] for note in state.notes[-5:]]),
            ("Turns left after this one", turns - state.turn),
        ]
    if state.settings.votes > 1:
        sections.append(("Wanted", f"{state.settings.votes - 1} paraphrases of each question"))
    return prompts.executive_messages(task, state.question, evidence, state.history_bytes, sections)


def on_reply(state: State, call: Call, reply: Reply) -> None:
    """The executive's reply could be read."""
    state.executive_failures, state.executive_replied = 0, True
    match reply:
        case Grounding():
            _ask(state, _first_questions(reply))
        case Pinning():
            _pin(state, reply)
        case Seeking():
            _seek(state, reply)
        case Synthesis():
            _answer(state, reply.final_answer, reply.justification, tuple(reply.evidence))
        case Decision(decision="ask"):
            before = len(state.notes)
            if ask_memory(state, [SubQuestion(question=reply.text)]):
                return
            if len(state.notes) > before:  # it would be asked again and again
                leave(state)
        case Decision() | FinalDecision():
            if not outage(state):
                _answer(state, reply.text, "", tuple(item.number for item in known(state.evidence)))


def on_lost(state: State, call: Call, reason: str, text: str | None) -> None:
    """The executive's call failed (text None), or its reply could not be read. The turn is lost, candidates are not."""
    state.note(f"the executive's turn is lost: {reason}")
    state.executive_failures = state.executive_failures + 1 if text is None else 0
    if state.stage is Stage.SYNTHESIS:
        if text and is_prose(text):
            state.note("the last reply is plain text and taken as the answer")
            _answer(state, text[:4000], "", tuple(item.number for item in known(state.evidence)))
        else:
            fail(state, f"the executive gave no answer that can be read: {reason}")
    elif state.stage is Stage.GROUNDING:
        _ask_the_question(state)
    elif state.executive_failures >= LOST:
        if not outage(state):
            synthesise(state)
    else:
        next_turn(state)


def on_batch(state: State) -> None:
    """Every question of the turn has ended."""
    close_batch(state)
    if state.silent_turns >= SILENT or set(state.ended_by) - {"pinning_turns", "seeking_turns"}:
        leave(state, last=True)
    elif state.stage is Stage.GROUNDING:
        leave(state)
    else:
        next_turn(state)


def next_turn(state: State) -> None:
    """One turn more of the present stage, or what follows it."""
    name = f"{state.stage}_turns"
    if state.turn >= getattr(state.settings.budget, name):
        state.exhausted(name)
        leave(state)
        return
    state.turn += 1
    ask_executive(state)


def enter(state: State, stage: Stage) -> None:
    state.stage, state.turn, state.silent_turns = stage, 0, 0
    next_turn(state)


def leave(state: State, last: bool = False) -> None:
    """The present stage is over. last: go to the synthesis at once."""
    if outage(state):
        return
    limit, compact = state.settings.budget, state.settings.executive_schema == "compact"
    if state.stage is Stage.GROUNDING and not last:
        if limit.pinning_turns:
            enter(state, Stage.PINNING)
        else:
            enter(state, Stage.SEEKING)
    elif state.stage is Stage.PINNING and not last and not compact:
        state.entity = state.entity or next(iter(state.candidates.ranked()), "")
        if state.entity:
            enter(state, Stage.SEEKING)
        else:
            synthesise(state)
    else:
        synthesise(state)


def outage(state: State) -> bool:
    """Whether every memory call of the present stage failed: an error of the request, never an answer."""
    heard = [item for item in state.evidence if item.stage is state.stage]
    if not heard or any(item.outcome != "failed" for item in heard):
        return False
    fail(
        state, f"the memory model answered none of {len(heard)} questions of the stage {state.stage}: {heard[-1].text}"
    )
    return True


def synthesise(state: State) -> None:
    """The last stage runs on what is known. Where nothing is, the answer is that, and no call is made."""
    if not known(state.evidence) and not state.settings.ungrounded:
        if state.evidence and all(item.outcome == "failed" for item in state.evidence):
            fail(state, f"the memory model answered no question: {state.evidence[-1].text}")
        elif not state.evidence or not state.executive_replied:  # who was never asked knows no less for it
            why = ", ".join((*state.ended_by, *state.notes[-1:]))
            status = 504 if "seconds" in state.ended_by else 502
            fail(state, f"the executive asked no question: {why}", status)
        else:
            finish(state, Result("unknown", UNKNOWN, "The memory model knew nothing about it."))
        return
    state.stage, state.turn = Stage.SYNTHESIS, 1
    ask_executive(state)


def fail(state: State, reason: str, status: int = 502) -> None:
    """End the run with an error."""
    finish(state, Result("error", reason, status=status))


def finish(state: State, result: Result) -> None:
    state.result = Result(
        result.kind, result.text, result.justification, result.evidence, state.ended_by, result.status
    )
    state.stage = Stage.DONE
    state.open.clear()
    state.outbox.clear()


def _answer(state: State, text: str, justification: str, evidence: tuple[int, ...]) -> None:
    there = {item.number for item in known(state.evidence)}
    if not there and not state.settings.ungrounded:
        finish(state, Result("unknown", UNKNOWN, "The memory model knew nothing about it."))
    elif kind_of(text) == "unknown":
        finish(state, Result("unknown", text, justification))
    else:
        finish(state, Result("answer", text, justification, tuple(n for n in dict.fromkeys(evidence) if n in there)))


def _ask_the_question(state: State) -> None:
    """Without an executive's first questions the user's own is asked."""
    _ask(state, [SubQuestion(question=state.question[:600].strip())])


def _ask(state: State, questions: list[SubQuestion]) -> None:
    if state.stage is Stage.GROUNDING and not questions:
        state.note("the executive named no question; the user's own is asked")
        questions = [SubQuestion(question=state.question[:600].strip())]
    if ask_memory(state, questions):
        return
    if not questions:
        state.note("a turn without a question")
    on_batch(state)


def _first_questions(reply: Grounding) -> list[SubQuestion]:
    """Three questions for a clue of high value, one for one of low value, and one for each pair of high ones."""
    high = sum(clue.value == "high" for clue in reply.clues)
    found = [question for clue in reply.clues for question in clue.questions[: 3 if clue.value == "high" else 1]]
    return found + reply.combined[: high * (high - 1) // 2]


def _pin(state: State, reply: Pinning) -> None:
    state.candidates = state.candidates.named(reply.candidates)
    if reply.confirmed:
        state.candidates = state.candidates.named([reply.confirmed, *reply.candidates])
        state.entity = state.candidates.find(reply.confirmed)
        if state.entity:
            leave(state)
            return
        state.note(f"confirmed but eliminated before: {reply.confirmed}")
    if reply.decision == "exhaust":
        leave(state)
    else:
        _ask(state, reply.sub_questions)


def _seek(state: State, reply: Seeking) -> None:
    if reply.pivot:
        state.candidates = state.candidates.named([*state.candidates.order, reply.pivot])
        if (found := state.candidates.find(reply.pivot)) and found != state.entity:
            state.entity = found
            state.note(f"pivot to {found}")
    if reply.decision == "answer":
        leave(state)
    else:
        _ask(state, reply.sub_questions)
