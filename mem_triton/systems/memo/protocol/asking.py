"""A turn's sub-questions: which are asked, how wordings vote, and what their replies mean for the candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mem_triton.systems.memo.protocol.calls import send
from mem_triton.systems.memo.protocol.candidates import same_question
from mem_triton.systems.memo.protocol.prompts import memory_messages
from mem_triton.systems.memo.protocol.schemas import SubQuestion
from mem_triton.systems.memo.protocol.state import Asked, Evidence, Heard, Stage, State
from mem_triton.systems.memo.protocol.unknown import normalised


def ask_memory(state: State, questions: Iterable[SubQuestion]) -> bool:
    """Ask all of a turn's questions at once (fact D6). False if there was nothing to ask, or no budget for any.

    Left out are questions that the turn repeats, dead ends, and under "strict" those that are answered already.
    """
    settings = state.settings
    seen = {same_question(item.question, settings.rules) for item in state.evidence if item.outcome == "answer"}
    skip = set(state.candidates.dead_ends(settings.dead_end)) | (seen if settings.rules == "strict" else set())
    batch: list[Asked] = []
    for question in questions:
        key = same_question(question.question, settings.rules)
        if key in skip:
            state.note(f"not asked again: {question.question}")
            continue
        if len(batch) == settings.questions:
            state.note(f"more than {settings.questions} questions; the rest is not asked")
            break
        skip.add(key)
        wordings = dict.fromkeys((question.question, *question.paraphrases))
        ids = []
        for wording in list(wordings)[: settings.votes]:
            call = send(state, "memory", memory_messages(wording, settings.dialect))
            ids += [call.id] if call is not None else []
        if not ids:
            state.note(f"no budget left to ask: {question.question}")
            break
        name = state.candidates.find(question.candidate) or question.candidate
        batch.append(Asked(question.question, name, tuple(ids)))
    state.batch, state.heard = tuple(batch), {}
    return bool(batch)


def batch_is_heard(state: State) -> bool:
    """Whether every question of the turn has ended."""
    return all(id in state.heard for asked in state.batch for id in asked.ids)


def give_up_batch(state: State, reason: str) -> None:
    """End the turn's open questions as failed."""
    for asked in state.batch:
        for id in asked.ids:
            state.heard.setdefault(id, Heard("failed", reason))
            state.open.pop(id, None)


def close_batch(state: State) -> None:
    """The turn's replies become evidence, in the order of the questions, whatever the order in which they came."""
    new = []
    for asked in state.batch:
        heard = _vote([state.heard[id] for id in asked.ids])
        number = len(state.evidence) + len(new) + 1
        new.append(
            Evidence(
                number, state.stage, state.turn, asked.question, asked.candidate, heard.outcome, heard.text, asked.ids
            )
        )
    if new:
        state.silent_turns = state.silent_turns + 1 if all(item.outcome == "failed" for item in new) else 0
    state.evidence = (*state.evidence, *new)
    turn = [(item.question, item.candidate, item.outcome) for item in new]
    pinning = state.stage is Stage.PINNING
    before = state.candidates
    state.candidates = before.heard(turn, state.entity, state.settings.rules, pinning)
    for name in state.candidates.eliminated[len(before.eliminated) :]:
        state.note(f"eliminated: {name}")
    state.batch, state.heard = (), {}


def _vote(heard: list[Heard]) -> Heard:
    """The most frequent reply of a question's wordings; the first of those that are equally frequent. Failed ones do
    not vote while another has replied."""
    votes = [one for one in heard if one.outcome != "failed"] or heard
    keys = [(one.outcome, normalised(one.text) if one.outcome == "answer" else "") for one in votes]
    winner, _ = Counter(keys).most_common(1)[0]  # of equal counts, the first met
    return votes[keys.index(winner)]
