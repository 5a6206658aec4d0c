"""The rules in code: who does not know, which candidates that costs their place, and what is JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mem_triton.systems.memo.protocol.candidates import Candidates
from mem_triton.systems.memo.protocol.parsing import read_object, read_reply
from mem_triton.systems.memo.protocol.prompts import history, memory_messages
from mem_triton.systems.memo.protocol.schemas import Pinning, Seeking, SubQuestion, json_schema
from mem_triton.systems.memo.protocol.stages import SCHEMAS
from mem_triton.systems.memo.protocol.state import Evidence, Stage
from mem_triton.systems.memo.protocol.unknown import kind_of, read_memory


def after(candidates, *turns, confirmed="", rules="strict", pinning=True):
    for turn in turns:
        told = [(f"Question {i} of {len(candidates.counts)}?", name, outcome) for i, (name, outcome) in enumerate(turn)]
        candidates = candidates.heard(told, confirmed, rules, pinning)
    return candidates


FOUR = Candidates().named(["A", "B", "C", "D"])
NO, YES, LOST = "unknown", "answer", "failed"


def test_d5_two_unknown_replies_cost_two_ranks_once_and_three_the_place():
    assert after(FOUR, [("A", NO)]).ranked() == ["A", "B", "C", "D"]
    assert after(FOUR, [("A", NO)], [("A", NO)]).ranked() == ["B", "C", "A", "D"]
    assert after(FOUR, [("A", NO), ("A", NO)]).ranked() == ["B", "C", "A", "D"]  # within one turn
    gone = after(FOUR, *[[("A", NO)]] * 3)
    assert gone.ranked() == ["B", "C", "D"] and gone.eliminated == ("A",)
    assert after(FOUR, [("A", NO)] * 3).ranked() == ["B", "C", "D"]


def test_d5_who_is_eliminated_does_not_come_back_and_other_spellings_are_the_same():
    gone = after(FOUR, [("a ", NO)] * 3)
    assert gone.eliminated == ("A",) and gone.named(["A", "a", "C", "E"]).ranked() == ["C", "E", "B", "D"]


def test_d5_a_confirmed_candidate_loses_ranks_and_keeps_its_place():
    kept = after(FOUR, [("A", NO)] * 4, confirmed="A")
    assert kept.eliminated == () and kept.ranked() == ["B", "C", "A", "D"]


def test_d5_an_answer_clears_what_is_in_a_row_and_not_the_total():
    turns = [[("A", NO)], [("A", NO)], [("A", YES)], [("A", NO)]]
    kept = after(FOUR, *turns)
    assert kept.eliminated == () and (kept.in_a_row("A"), kept.total("A")) == (1, 3)
    as_authors = after(FOUR, *turns, rules="paper")  # a total that nothing resets
    assert as_authors.eliminated == ("A",)


def test_d5_the_authors_rules_count_in_the_pinning_stage_alone():
    assert after(FOUR, [("A", NO)] * 5, rules="paper", pinning=False).eliminated == ()
    assert after(FOUR, [("A", NO)] * 5, pinning=False).eliminated == ("A",)


def test_d5_a_failed_call_is_no_ignorance():
    assert after(FOUR, [("A", LOST)] * 9) == FOUR
    assert after(FOUR, [("A", NO)], [("A", LOST)], [("A", NO)]).in_a_row("A") == 2


def test_d5_dead_ends_are_questions_of_the_same_words():
    spelled = ["Who is A?", "who is  a", "“Who is A”?!"]
    strict = paper = Candidates()
    for question in spelled:
        strict = strict.heard([(question, "", NO)], "", "strict", True)
        paper = paper.heard([(question, "", NO)], "", "paper", True)
    assert strict.dead_ends(3) == ["who is a"] and paper.dead_ends(3) == []


@given(
    st.lists(st.lists(st.tuples(st.sampled_from("ABCDE"), st.sampled_from([NO, YES, LOST])), max_size=4), max_size=6)
)
def test_d5_nobody_is_in_two_places_and_ranks_are_whole(turns):
    end = after(FOUR, *turns)
    assert sorted(end.ranked() + [n for n in end.eliminated if n in "ABCD"]) == ["A", "B", "C", "D"]
    assert all(end.in_a_row(name) <= end.total(name) for name in "ABCDE")


UNKNOWN = [
    "I don't know",
    "I don’t know.",
    "i DO NOT know!",
    "  I don't know. The documents do not say.",
    "I dont know",
    "I'm not sure.",
    "Unknown",
    "N/A",
    "Ich weiß es nicht.",
    "Das weiß ich nicht",
    "Je ne sais pas.",
    "No lo sé.",
    "No sé",
    "我不知道。",
    "我不知道谁创立了它",
    "I don't know who founded Norlux.",
    '{"answer": "I don’t know", "reasoning": "x"}',
    '{"answer": "", "reasoning": "Norlux"}',
    '{"answer": null}',
    '```json\n{"answer": "unknown"}\n```',
    '"I don\'t know."',
    "<think>Norlux?</think>I don't know.",
]
ANSWERS = [
    "Norlux",
    "Unknown Pleasures",
    "None of them lives in Gent; he lives in Lima.",
    "Knowing him: he is a baker.",
    '{"answer": "Norlux", "reasoning": "I don\'t know more than that."}',
    "Norlux. I don't know the year.",
    "0",
    "I don't know exactly, but it is Norlux.",
    "Ich weiß nicht genau, aber es ist Norlux.",
    '{"answer": 7}',
    '{"city": "Lima"}',
    "No sensible person would",
    "Nobody knows it better than Odin Holm.",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_d5_ignorance_is_recognised_in_five_languages(text):
    assert read_memory(text)[0] == "unknown"


@pytest.mark.parametrize("text", ANSWERS)
def test_d5_an_answer_is_kept_whatever_its_reasoning_says(text):
    assert read_memory(text)[0] == "answer"


def test_d5_control_the_authors_substring_test_throws_right_answers_away():
    wrong = [text for text in ANSWERS if "i don't know" in text.lower()]
    missed = [text for text in UNKNOWN if "i don't know" not in text.lower()]
    assert (len(wrong), len(ANSWERS)) == (3, 13) and len(missed) > 10


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't help with that.", "Es tut mir leid, aber ich kann das nicht."]
)
def test_a_refusal_is_neither(text):
    assert kind_of(text) == "refused"


@given(st.text(max_size=300))
def test_d4_no_text_crashes_the_readers(text):
    read_memory(text)
    read_object(text)
    for model in SCHEMAS.values():
        reply, wrong = read_reply(text, model)
        assert (reply is None) == bool(wrong)


def test_d4_replies_are_repaired_where_that_is_possible():
    for text in (
        '{"decision": "ask", "sub_questions": [{"question": "Who?"}]}',
        "{'decision': 'ask', sub_questions: [{question: 'Who?'}]",
        'Sure!\n```json\n{"decision": "ask", "sub_questions": [{"question": "Who?"}],}\n```\nBye',
        '<think>{"decision": "answer"}</think>{"decision": "ask", "sub_questions": [{"question": "Who?"}]} {"x": 1}',
    ):
        reply, wrong = read_reply(text, Seeking)
        assert reply == Seeking(decision="ask", sub_questions=[SubQuestion(question="Who?")]), wrong


def test_d4_what_cannot_be_repaired_says_what_is_wrong():
    cases = {
        "": "empty",
        "no": "no JSON object",
        '{"decision": "maybe"}': "decision",
        "{" * 90: "too deep",
        '{"decision": "ask", "sub_questions": [{"question": ""}]}': "sub_questions.0.question",
    }
    for text, said in cases.items():
        reply, wrong = read_reply(text, Seeking)
        assert reply is None and said in wrong


def test_schemas_are_what_structured_output_takes():
    """No references, nothing left open, all keys required, lengths and counts limited."""
    for model in SCHEMAS.values():
        todo = [json_schema(model)]
        while todo:
            node = todo.pop()
            assert "$ref" not in node and "default" not in node
            if node.get("type") == "object":
                assert node["additionalProperties"] is False and node["required"] == list(node["properties"])
                todo += node["properties"].values()
            if node.get("type") == "array":
                assert node["maxItems"] > 0
                todo.append(node["items"])
            if node.get("type") == "string" and "enum" not in node and "const" not in node:
                assert node["maxLength"] > 0
    assert json_schema(Pinning)["properties"]["sub_questions"]["items"]["properties"]["question"]["minLength"] == 1


@given(st.lists(st.text(max_size=200), max_size=30), st.integers(500, 3000))
def test_the_history_is_never_longer_than_allowed_and_drops_the_oldest(texts, limit):
    items = [Evidence(i, Stage.PINNING, 1, "Who?", "", "answer", text, (i,)) for i, text in enumerate(texts, 1)]
    said = history(items, limit)
    assert len(said.encode()) <= limit
    if "left out" in said:
        assert '"number": 1,' not in said and f'"number": {len(items)},' in said


def test_the_plain_dialect_is_the_bare_question():
    assert [m.content for m in memory_messages("Who?", "plain")] == ["Who?"]
    assert memory_messages("Who?", "paper")[0].content.endswith("\n\nQuestion: Who?")
