"""Memory counts against the model's context: named entries like text, retrieved ones as far as there is room."""

from __future__ import annotations

import pytest

from mem_triton.store.pool.plan import Attachment
from mem_triton.systems.explicit import context

PLAN = (Attachment("a@1"), Attachment("b@1"), Attachment("c@1", 0, 64, 0.9), Attachment("d@1", 64, 128, 0.5))
TOKENS = {"a@1": 100, "b@1": 50, "c@1": 30, "d@1": 30}


def test_fault15_named_entries_count_once_and_retrieved_ones_not():
    assert context.named_tokens((*PLAN, Attachment("a@1")), TOKENS) == 150
    assert context.named_tokens(PLAN[2:], TOKENS) == 0


@pytest.mark.parametrize("memory, prompt, fits", [(150, 49, True), (150, 50, False), (0, 500, True), (200, 1, False)])
def test_fault15_memory_prompt_and_one_token_of_the_answer_fit_or_both_numbers_are_said(memory, prompt, fits):
    why = context.beyond(memory, prompt, 200)
    assert (why is None) == fits
    assert fits or (f"{memory} tokens" in why and "200 tokens" in why)


def test_fault15_an_answer_ends_where_the_context_does():
    assert context.answer_limit(None, 0, 40, 200) == (160, None)
    assert context.answer_limit(20, 100, 40, 200) == (20, None)
    limit, why = context.answer_limit(100, 100, 40, 200)
    assert limit == 60 and "100 of 200 tokens" in why and "at most 60" in why
    assert context.answer_limit(9, 500, 400, 200)[0] == 1, "what has run so far is not cut to nothing"


def test_fault15_retrieved_references_stay_as_far_as_a_token_has_room_for_them():
    assert context.within(PLAN, TOKENS, 180) == PLAN, "no token sees both"
    assert context.within(PLAN, TOKENS, 179) == PLAN[:2]
    together = (*PLAN[:3], Attachment("d@1", 0, 64, 0.5))
    assert context.within(together, TOKENS, 209) == PLAN[:3], "the one that resembles the text more"
