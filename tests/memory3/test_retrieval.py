"""The reading schedule: who asks, when, and which tokens see what was found."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mem_triton.store.bank import Hit
from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton.systems.explicit.retrieval import Retriever


@dataclass
class FakeBank:
    """Finds "<first token>.<n>@1" for any query, and remembers what it was asked."""

    asked: list[tuple[str, int, str]] = field(default_factory=list)

    def search(self, text, top_k, tenant="", source=None, only_filled=False):
        assert only_filled
        self.asked.append((text, top_k, tenant))
        return [Hit(f"{text.split()[0]}.{n}@1", 0.9 - 0.1 * n) for n in range(top_k)]


def decode(ids):
    return " ".join(map(str, ids))


def retriever(bank=None, **options) -> Retriever:
    return Retriever(bank or FakeBank(), **{"decode": decode, "top_k": 2, "every": 4, **options})


def test_each_chunk_of_the_prompt_asks_for_its_own():
    bank = FakeBank()
    plan = retriever(bank).plan(list(range(10)), tenant="acme", refreshes=True)
    assert bank.asked == [("0 1 2 3", 2, "acme"), ("4 5 6 7", 2, "acme"), ("6 7 8 9", 2, "acme")]
    assert [(a.ref, a.first, a.end) for a in plan] == [
        ("0.0@1", 0, 4),
        ("0.1@1", 0, 4),
        ("4.0@1", 4, 8),
        ("4.1@1", 4, 8),
        ("6.0@1", 8, 14),
        ("6.1@1", 8, 14),
    ]
    assert [a.score for a in plan[:2]] == [0.9, 0.8]


def test_a_prompt_of_whole_chunks_or_less_than_one():
    assert [(a.first, a.end) for a in retriever(top_k=1).plan(list(range(8)), refreshes=True)] == [(0, 4), (4, 12)]
    assert [(a.first, a.end) for a in retriever(top_k=1).plan([7])] == [(0, FOREVER)]
    assert retriever().plan([]) == ()


def test_without_refreshing_the_last_chunks_references_stay():
    assert [a.end for a in retriever(top_k=1).plan(list(range(10)))] == [4, 8, FOREVER]


def test_b11_retrieval_happens_at_boundaries_of_generated_tokens_only():
    """Not of all tokens: a prompt of 10 does not shift them."""
    bank = FakeBank()
    r = retriever(bank, top_k=1)
    plan = r.plan(list(range(10)), refreshes=True)
    bank.asked.clear()
    history = []
    for count in range(1, 14):
        generated = [100 + i for i in range(count)]
        plan = r.extend(plan, 10, generated)
        history.append((count, len(bank.asked)))
    assert [count for (count, n), (_, before) in zip(history[1:], history, strict=False) if n > before] == [4, 8, 12]
    assert [text for text, _, _ in bank.asked] == ["100 101 102 103", "104 105 106 107", "108 109 110 111"]
    assert [(a.ref, a.first, a.end) for a in plan[3:]] == [
        ("100.0@1", 14, 18),
        ("104.0@1", 18, 22),
        ("108.0@1", 22, 26),
    ]


def test_extending_changes_no_argument_and_asks_once():
    bank = FakeBank()
    r = retriever(bank)
    plan = r.plan(list(range(4)), refreshes=True)
    copy = tuple(plan)
    longer = r.extend(plan, 4, [9, 9, 9, 9], top_k=1, tenant="acme")
    assert plan == copy and len(longer) == len(plan) + 1 and bank.asked[-1] == ("9 9 9 9", 1, "acme")
    asked = len(bank.asked)
    assert r.extend(longer, 4, [9, 9, 9, 9, 9]) == longer and len(bank.asked) == asked
    assert r.extend(plan, 4, [9, 9, 9]) == plan and len(bank.asked) == asked


def test_nothing_is_attached_twice_where_it_is_seen():
    attached = (Attachment("0.0@1"), Attachment("4.1@1", 0, 4))
    plan = retriever().plan(list(range(8)), attached=attached)
    assert [a.ref for a in plan] == ["0.1@1", "4.0@1", "4.1@1"]
    assert [a.ref for a in retriever().extend((Attachment("9.0@1"),), 8, [9] * 4)] == ["9.0@1", "9.1@1"]


def test_weak_hits_and_no_hits_are_left_out():
    assert [a.score for a in retriever(top_k=5, min_score=0.65).plan([1])] == [0.9, 0.8, 0.7]
    bank = FakeBank()
    assert retriever(bank).plan([1], top_k=0) == () and bank.asked == []
    for bad in ({"top_k": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            retriever(**bad)
