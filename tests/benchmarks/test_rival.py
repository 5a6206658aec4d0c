"""What ``benchmarks.engines.rival`` asks of both servers, and what it says of made-up times."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest

from benchmarks.engines import rival

ARGS = SimpleNamespace(requests=16, rounds=3)


class Served:
    """A client that answers at once and remembers what was asked."""

    def __init__(self, name: str) -> None:
        self.server, self.random, self.asked = SimpleNamespace(name=name), random.Random(1), []

    async def times(self, tokens: int, fields, prompt: list[int]) -> list[float]:
        self.asked.append((fields, prompt))
        return [0.1] * tokens


def test_both_servers_are_asked_the_same_questions_about_the_same_documents():
    text, bank = Served("stock"), Served("bank")
    asked = rival.requests("combinations", ARGS, 0)
    for client in (text, bank):
        found = asyncio.run(rival.Asker(client, 40).part(asked))
        assert found["first"] == [0.1] * 16 and found["tokens_per_s"] > 0
    for (no_fields, prompt), (fields, question) in zip(text.asked, bank.asked, strict=True):
        numbers = [int(id.removeprefix("document-")) for id in fields["mem_ids"]]
        assert no_fields is None and prompt == [*(t for i in numbers for t in rival.document(i, 40)), *question]


@pytest.mark.parametrize(
    ("part", "count", "kinds"),
    [
        ("one document", 16, 1),
        ("combinations", 16, 16),
        ("after a restart", rival.FEW, rival.FEW),
        ("many documents", rival.MANY, rival.MANY),
    ],
)
def test_each_part_asks_for_what_it_is_called(part, count, kinds):
    asked = rival.requests(part, ARGS, 0)
    assert len(asked) == count and len(set(asked)) == kinds and asked == rival.requests(part, ARGS, 0)
    assert rival.MANY > rival.HELD > rival.FEW


def test_a_ratio_below_one_is_a_bank_that_answers_sooner():
    rounds = [{"stock": {"first": [2.0], "tokens_per_s": 10.0}, "bank": {"first": [1.0], "tokens_per_s": 15.0}}]
    told = rival.row(rounds)
    assert told["time_to_first_token_ratio"]["p50"] == 0.5 and told["tokens_per_s_ratio"]["median"] == 1.5
