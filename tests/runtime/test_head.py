"""A request with references of a chat: the head in front of them, and not in its prompt a second time."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mem_triton import ids, metrics
from mem_triton.store.pool.plan import Attachment
from mem_triton.systems.explicit.head import BankHead, head_end, is_head
from mem_triton.systems.explicit.retrieval import Retriever
from tests.store.bank_case import entry, spec

HEAD = "<u>"
PLAN, TOKENS = (Attachment("a@1"), Attachment("b@1")), {"a@1": 5, "b@1": 9}


class Letters:
    """A tokenizer of characters."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))


def head(tokens: int = len(HEAD), kind: str = "parallel", tokenizer=Letters) -> BankHead:
    bank = SimpleNamespace(
        spec=SimpleNamespace(kind=kind, prefix_text=HEAD),
        sink=lambda: SimpleNamespace(tokens=tokens) if tokens else None,
    )
    return BankHead(bank, tokenizer, logging.getLogger("test"))


def prompt(text: str) -> list[int]:
    return list(map(ord, text))


def test_the_head_is_in_front_of_the_longest_reference_and_gone_from_the_prompt():
    joined = head().join(PLAN, TOKENS, prompt("<u>who?"))
    first, *rest = joined.plan
    assert tuple(rest) == PLAN and is_head(first.ref) and head_end(first.ref) == 9
    assert joined.tokens == {**TOKENS, first.ref: 3}
    assert (joined.dropped, joined.note) == (3, None)
    assert not ids.is_id(first.ref) and head_end("a@1") is None


@pytest.mark.parametrize("text", ["<s>who?", "who?", "<u", "<u>", ""])
def test_a_prompt_with_another_head_stays_and_is_counted(text, caplog):
    """Nothing but the head would be left of "<u>": an engine needs a token."""
    before = metrics.HEADS_APART._value.get()
    one = head()
    for _ in range(2):
        joined = one.join(PLAN, TOKENS, prompt(text))
        assert joined.dropped == 0 and "does not begin with the head" in joined.note and len(joined.plan) == 3
    assert metrics.HEADS_APART._value.get() == before + 2
    assert len(caplog.records) == 1, "said once"


def test_without_a_tokenizer_it_says_so():
    assert "no tokenizer" in head(tokenizer=None).join(PLAN, TOKENS, prompt("<u>who?")).note


def test_without_a_plan_or_a_head_nothing_changes():
    assert head().join((), {}, prompt("<u>who?")).plan == ()
    for one in (head(tokens=0), head(kind="memory3"), head(kind="prefix")):
        joined = one.join(PLAN, TOKENS, prompt("<u>who?"))
        assert (joined.plan, joined.dropped, joined.note) == (PLAN, 0, None)


def test_a_bank_that_is_written_later_has_its_head_then():
    one = head(tokens=0)
    assert one.tokens == 0
    one._bank.sink = lambda: SimpleNamespace(tokens=3)
    assert one.tokens == 3


def test_references_of_a_whole_request_are_seen_by_all_of_it(tmp_path):
    from mem_triton.store.bank import Bank

    with Bank.create(tmp_path / "bank", spec()) as bank:
        bank.add([entry("a", 1, "The locker of Mara is falcon."), entry("b", 2, "The badge of Hugo is amber.")])
        retriever = Retriever(bank, decode=str, top_k=1)
        (found,) = retriever.whole("Who has the badge of Hugo?")
        assert (found.ref, found.first, found.end) == ("b@1", 0, Attachment("b@1").end)
        assert found.score is not None
        assert retriever.whole("Who has the badge of Hugo?", attached=[Attachment("b@1")]) == ()
