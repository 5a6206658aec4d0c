"""What a bank is searched for: the last thing that a user said, whatever the chat around it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from benchmarks.recall.data import facts, question
from mem_triton.store.bank import Bank
from mem_triton.systems.explicit.frontend import ExplicitFrontEnd, Reading
from mem_triton.systems.explicit.retrieval import Retriever
from mem_triton.systems.explicit.user_turn import LastUserMessage, UserTurns
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.store.bank_case import entry, spec
from tests.support.front import front_end

SYSTEM = "You are the porter of a hotel. Be brief, be kind, and never guess: say so when you do not know an answer."
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Good morning! Where do I leave my luggage until three o'clock?"},
    {"role": "assistant", "content": "Beside the desk, please."},
    {"role": "user", "content": "Thanks.\n\nWhat is the locker of Mara Stone?"},
]
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<s>[INST] {{ (system if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default system prompt": f"{DEFAULT}{CHATML}<think>\n\n</think>\n",
    "llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama 2": LLAMA_2,
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:",
}


def renderer(template: str):
    from jinja2 import Environment

    compiled = Environment().from_string(template)
    return lambda messages: compiled.render(messages=messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_fault24_the_last_user_message_is_found_in_what_a_template_makes_of_a_chat(name):
    render = renderer(TEMPLATES[name])
    turns = UserTurns.of(render)
    assert turns.last(render(CHAT)) == CHAT[-1]["content"]
    for chat in (CHAT[1:], CHAT[3:], [CHAT[0], CHAT[3]]):
        assert turns.last(render(chat)) == turns.last(render(CHAT)), "with and without a system prompt, first and later"
    answered = [*CHAT, {"role": "assistant", "content": "Falcon."}]
    assert turns.last(render(answered)) == turns.last(render(CHAT)), "an answer that is to be gone on with"
    assert turns.last("a text without turns") is None


def test_fault24_templates_that_mark_no_turn_or_fail_leave_the_whole_prompt():
    def fails(messages):
        raise RuntimeError("only for images")

    said = logging.getLogger("test")
    for render in (None, fails, lambda messages: "".join(m["content"] for m in messages), lambda messages: "nothing"):
        assert LastUserMessage(bytes.decode, render, said).of(b"who has the key?", 8) is None


def decode(tokens) -> str:
    return "".join(map(chr, tokens))


def front(bank: Bank, render=None, every: int = 64) -> ExplicitFrontEnd:
    """A front end of characters as tokens, without an engine."""
    front = object.__new__(ExplicitFrontEnd)
    front.section = SimpleNamespace(retrieval=SimpleNamespace(top_k=1, every=every, refresh=True))
    front.bank, front._default, front.max_model_len, front.obstacle = bank, {}, 4096, None
    front.retriever = Retriever(bank, decode=decode, top_k=1, every=every)
    front.last_user_message = LastUserMessage(decode, render, logging.getLogger("test"))
    return front


def found(front: ExplicitFrontEnd, text: str, **words) -> str:
    """The reference that the answer sees."""
    request = parse_request(words).systems["memory"]
    plan = front.find(Reading(request, top_k=1), list(map(ord, text)))
    return plan[-1].ref


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """28 facts in a bank, and the questions for them."""
    some = facts(seed=5, n=28)
    with Bank.create(tmp_path_factory.mktemp("told") / "bank", spec()) as bank:
        bank.add([entry(f"f{i}", i, f"The {f.attribute} of {f.name} is {f.value}.") for i, f in enumerate(some)])
        yield bank, [question(f, seed=i) for i, f in enumerate(some)]


def test_fault24_questions_find_their_fact_behind_a_system_prompt_and_earlier_turns(told):
    bank, questions = told
    render = renderer(CHATML)
    before = [*CHAT[:3], {"role": "user", "content": questions[0]}, {"role": "assistant", "content": "I do not know."}]
    counts = {}
    for name, chooser in (("message", front(bank, render, 256)), ("whole", front(bank, every=256))):
        chats = [render([*before, {"role": "user", "content": q}]) for q in questions]
        counts[name] = sum(found(chooser, chat) == f"f{i}@1" for i, chat in enumerate(chats))
    assert counts["message"] >= 27 > counts["whole"], counts


def test_fault24_a_request_may_say_what_is_searched_for(told):
    bank, questions = told
    asked = found(front(bank, renderer(CHATML)), renderer(CHATML)(CHAT), mem_query=questions[9])
    assert asked == "f9@1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mem_query": ""}, "text of 1 to 4096"),
        ({"mem_query": 7}, "text of 1 to 4096"),
        ({"mem_query": "x" * 4097}, "text of 1 to 4096"),
        ({"mem_query": "who?", "mem_top_k": 0}, "mem_top_k is 0"),
        ({"mem_query": "who?", "mem_ids": ["f1"]}, "mem_ids names what to read; add mem_top_k"),
    ],
)
def test_fault24_a_query_that_nobody_searches_by_is_refused(told, words, message):
    bank, _ = told
    memory = front_end(explicit=(explicit := front(bank)))
    explicit.residency = SimpleNamespace(pages_for=lambda tokens: 1)
    explicit.layout, explicit.longest_step = SimpleNamespace(max_pages=99), 64
    with pytest.raises(RequestError, match=message) as error:
        memory.open(words, RequestParams())
    assert error.value.field == "mem_query"


def test_fault24_a_long_message_asks_with_its_end(told):
    bank, questions = told
    text = renderer(CHATML)([{"role": "user", "content": f"{questions[1]} {'No. ' * 99} {questions[2]}"}])
    assert found(front(bank, renderer(CHATML)), text) == "f2@1"
