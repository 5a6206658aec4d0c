"""Chats as they are kept: each turn closed, no system prompt, whatever template they come from."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mem_triton.store.bank import Bank
from mem_triton.systems.explicit.captures import Captures
from mem_triton.systems.explicit.chat import chat_frame
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.runtime.capture_case import make_bank

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "its own system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe Qwen.<|im_end|>\n{% endif %}"
    + CHATML,
    "thoughts": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
    "bos": "{{ bos_token }}" + CHATML,
    "llama": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "an answer without a word before it": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}[SYS] "
    "{{ m.content }} [/SYS]{% endif %}{% endfor %}",
}
SYSTEM = {"role": "system", "content": "Answer like a pirate."}
USER = {"role": "user", "content": "The locker is falcon."}
SAID = {"role": "assistant", "content": "Noted."}
NEXT = {"role": "user", "content": "And the key is red."}


@pytest.fixture(scope="module")
def tokenizer():
    from tests.support.models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    marks = ["<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]", "[SYS]", "<think>", "</think>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": marks})
    return tokenizer


def render(tokenizer, *messages, **options) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("before", [(USER,), (SYSTEM, USER), (SYSTEM, USER, SAID, NEXT)])
def test_fault07_a_kept_chat_is_its_closed_turns_without_a_system_prompt(tokenizer, name, before):
    tokenizer.chat_template = TEMPLATES[name]
    frame, own = chat_frame(tokenizer), "<|im_start|>system\nBe Qwen.<|im_end|>\n"
    asked = render(tokenizer, *before, add_generation_prompt=True)
    turns = [message for message in before if message is not SYSTEM]
    end, first = "<|eot|>" if name == "llama" else "<|im_end|>", "" if frame.assistant else " "
    said = tokenizer.encode(f"{first}Aye.{end}", add_special_tokens=False)
    for answer, expected in ((None, turns), (said, [*turns, {"role": "assistant", "content": "Aye."}])):
        kept = tokenizer.decode(frame.kept(asked, answer))
        assert kept == tokenizer.apply_chat_template(expected, tokenize=False).replace(own, "")
        assert "pirate" not in kept and not kept.endswith("assistant\n")


def test_fault07_what_the_model_thought_first_is_left_out(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    frame = chat_frame(tokenizer)
    answer = tokenizer.encode("<think>hm</think>\n\nAye.<|im_end|>", add_special_tokens=False)
    kept = tokenizer.decode(frame.kept(render(tokenizer, USER, add_generation_prompt=True), answer))
    assert kept == tokenizer.apply_chat_template([USER, {"role": "assistant", "content": "Aye."}], tokenize=False)


def test_fault07_a_turn_that_the_request_has_begun_is_closed(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    frame, closed = chat_frame(tokenizer), render(tokenizer, SYSTEM, USER, SAID)
    begun = closed[: -len(frame.closed)]
    assert frame.kept(begun, None) == frame.kept(closed, None) == render(tokenizer, USER, SAID)


def test_fault07_text_that_is_no_chat_stays_as_it_is(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    frame, text = chat_frame(tokenizer), tokenizer.encode("assistant: a user said nothing")
    assert frame.kept(text, None) == text and frame.kept(text, [5, 6]) == [*text, 5, 6]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", CHATML.replace("<|im_start|>", "# ")])
def test_fault07_a_chat_whose_turns_cannot_be_told_is_refused_before_it_runs(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    assert chat_frame(tokenizer) is None
    layout = SimpleNamespace(max_pages=8, page_tokens=16)
    with Bank.open(make_bank(tmp_path / "bank")) as bank:
        captures = Captures(bank, layout, "own", 512, str, lambda: chat_frame(tokenizer), logging.getLogger())
        request = parse_request({"mem_capture": "note"}).systems["memory"]
        capture = captures.check(request, RequestParams(chat=True))
        with pytest.raises(RequestError, match="where they end is unknown"):
            captures.begin(capture, [1, 2, 3])
        captures.release(capture)
        captures.begin(captures.check(request, RequestParams()), [1, 2, 3])
