"""The corpora of the shipped adapters, and the questions of the benchmark: nothing leaks into training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.memo import corpora
from benchmarks.memo.corpora import EPOCHS, WORLD, executive_rows, kept_rows, kept_traces, memory_rows, strangers
from benchmarks.memo.hops import ALL_HOPS, ALSO, HOPS, MIDDLE, two_hop_wordings
from benchmarks.memo.rows import KINDS, chosen, questions
from benchmarks.memo.wordings import WORDINGS
from benchmarks.memo.world import OF_COMPANIES, OF_PEOPLE, RELATIONS, UNKNOWN
from mem_triton.systems.memo.protocol.machine import start
from mem_triton.systems.memo.protocol.schemas import Decision
from mem_triton.systems.memo.protocol.settings import Settings
from mem_triton.systems.memo.training.rows import digest, read_data

SHIPPED = Path(corpora.__file__).parent / "adapters"


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


def said(row: dict) -> str:
    return row["completion"][0]["content"]


MEMORY, EXECUTIVE = list(memory_rows()), list(executive_rows())


def test_the_world_has_98_facts_and_every_relation_its_wordings():
    assert sum(map(len, WORLD.facts.values())) == 98
    assert set(WORDINGS) == set(RELATIONS) == {*OF_PEOPLE, *OF_COMPANIES}
    assert all(len(set(shown)) == 20 and len(kept) == 2 for shown, kept in (*WORDINGS.values(), *MIDDLE.values()))
    assert all(len(set(two_hop_wordings(*hop, kept=False))) >= 160 for hop in ALL_HOPS)
    assert set(HOPS) < set(ALL_HOPS)
    assert all(not set(two_hop_wordings(*hop, True)) & set(two_hop_wordings(*hop, False)) for hop in HOPS)


def test_each_epoch_shows_every_fact_and_names_that_no_other_epoch_shows():
    facts = {WORLD.sentence(name, relation) for name in WORLD.facts for relation in WORLD.facts[name]}
    named = []
    for epoch in range(EPOCHS):
        rows = [row for row in MEMORY if row["epoch"] == epoch]
        assert facts <= {said(row) for row in rows}
        unknown = {asked(row) for row in rows if said(row) == UNKNOWN}
        assert len(unknown) > 40
        named.append(unknown)
    everything = [question for unknown in named for question in unknown]
    assert len(set(everything)) > 0.9 * len(everything)


def test_no_unknown_name_is_known_and_none_of_the_evaluation_is_trained():
    people, firms, kept_people, kept_firms = strangers(WORLD)
    known = set(WORLD.facts)
    assert not known & {*people, *firms, *kept_people, *kept_firms}
    assert not {*people, *firms} & {*kept_people, *kept_firms}
    text = "\n".join(map(asked, MEMORY))
    assert not [name for name in (*kept_people, *kept_firms) if name in text]
    shown = set(map(asked, MEMORY))
    assert not [one for kind, some in questions().items() if kind != KINDS[1] for one in some if one.text in shown]
    assert not [row for row in kept_rows() if asked(row) in shown]


MARKS = re.compile(
    r"(?<!\w)(pays|staff|place of work|creat|establish|comes from|earn|trade|hear|concert|sort of|creature|shares|"
    r"run|visit|travel|merchandise|factory|known|shade|sign|printed|describe)|'s birth"
)
"""What marks the wordings for evaluation."""


def test_no_wording_that_is_shown_has_what_marks_those_for_evaluation():
    phrases = [phrase for _, _, some in ALSO.values() for phrase in some]
    shown = [text.lower() for some, _ in (*WORDINGS.values(), *MIDDLE.values()) for text in some] + phrases
    kept = [text.lower() for _, some in (*WORDINGS.values(), *MIDDLE.values()) for text in some]
    assert not [text for text in shown if MARKS.search(text)]
    unmarked = [text for text in kept if not MARKS.search(text)]
    assert not unmarked, "negative control: what is looked for is in the others"


def test_the_executive_learns_from_other_names_and_other_wordings():
    names = set(WORLD.facts) | set(strangers(WORLD)[2]) | set(strangers(WORLD)[3])
    text = json.dumps(EXECUTIVE)
    assert not [name for name in names if name in text]
    kept = [phrase.partition("{n}")[0].strip() for _, phrases in MIDDLE.values() for phrase in phrases]
    assert not [phrase for phrase in kept if phrase and phrase in text]
    assert any(phrase in json.dumps(list(kept_traces())) for phrase in kept if phrase)
    decisions = [Decision.model_validate_json(said(row)) for row in EXECUTIVE]
    assert {one.decision for one in decisions} == {"ask", "answer"}


def test_a_trace_has_the_messages_that_the_protocol_sends():
    first = next(row for row in EXECUTIVE if asked(row).endswith("nothing yet"))
    question = asked(first).removeprefix("Question: ").partition("\n")[0]
    _, (call,) = start(question, Settings(executive_schema="compact", instructed=False))
    assert [{"role": m.role, "content": m.content} for m in call.messages] == first["prompt"]
    _, (told,) = start(question, Settings(executive_schema="compact"))
    assert [m.role for m in told.messages] == ["system", "user"] and told.messages[1] == call.messages[0]


def test_written_corpora_are_rows_that_training_reads_and_the_same_again(tmp_path):
    for folder in ("a", "b"):
        corpora.write(tmp_path / folder)
    for name in corpora.CORPORA:
        train, held_out = read_data(tmp_path / "a" / name, None)
        assert train and held_out
        for file in ("train.jsonl", "eval.jsonl"):
            assert (tmp_path / "a" / name / file).read_bytes() == (tmp_path / "b" / name / file).read_bytes()


def test_the_memory_corpus_is_the_one_that_the_shipped_adapter_s_card_names(tmp_path):
    corpora.write(tmp_path)
    train, held_out = read_data(tmp_path / "memory", None)
    assert digest([*train, *held_out]) in (SHIPPED / "memory" / "README.md").read_text()


@pytest.mark.parametrize("count", [8, 40])
def test_as_many_questions_of_each_kind(count):
    assert [sum(one.kind == kind for one in chosen(count)) for kind in KINDS] == [count // 4] * 4


def test_what_is_right():
    known = next(one for one in chosen(8) if one.value)
    unknown = next(one for one in chosen(8) if not one.value)
    assert known.is_right(f"It is {known.value}.") and not known.is_right("I don't know.")
    assert unknown.is_right("I don't know.") and not unknown.is_right("A parrot.")
