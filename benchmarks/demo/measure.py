"""What is asked of the servers, and what is counted: recall of told facts, output tokens per second, TTFT."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.client import Answer, Client, Messages, user
from benchmarks.recall import data


@dataclass(frozen=True)
class Person:
    """One session: its name and the facts that are told in it."""

    session: str
    told: list[data.Fact]
    message: str


def people(count: int, most_facts: int, seed: int) -> list[Person]:
    """``count`` sessions with 1, 2, ..., most_facts, 1, 2, ... facts."""
    chosen = []
    for i in range(count):
        told = data.facts(seed + i, 1 + i % most_facts)
        chosen.append(Person(f"user-{i + 1:02d}", told, data.fact_message(told)))
    return chosen


@dataclass
class Recall:
    """Questions answered right, by the number of facts that the session was told."""

    right: dict[int, int] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)

    def count(self, facts: int, correct: bool) -> None:
        self.right[facts] = self.right.get(facts, 0) + correct
        self.asked[facts] = self.asked.get(facts, 0) + 1

    def total(self) -> tuple[int, int]:
        return sum(self.right.values()), sum(self.asked.values())


@dataclass(frozen=True)
class Speed:
    """One repeat. tokens_per_second: output tokens of all requests over the wall time; ttft: median, in seconds."""

    tokens_per_second: float
    ttft: float


Fields = Callable[[Person], dict[str, Any] | None]
"""The memory fields of a person's request."""


@dataclass(frozen=True)
class Memory:
    """One kind of memory: what a request says to be remembered, to ask later, and in the speed test."""

    tell: Fields = lambda person: None
    ask: Fields = lambda person: None
    speed: Fields = lambda person: None


NONE = Memory()
SESSION = Memory(
    tell=lambda p: {"mem_session": p.session},
    ask=lambda p: {"mem_session": p.session, "mem_write": 0},  # reads alone, so several may run at once
    speed=lambda p: {"mem_session": p.session},  # starts from the state, writes it at every token, commits it
)
"""δ-mem: a state of the session."""
ENTRY = Memory(
    tell=lambda p: {"mem_capture": p.session, "mem_capture_answer": 1, "mem_replace": 1},
    ask=lambda p: {"mem_ids": [f"capture:{p.session}"]},
    speed=lambda p: {"mem_ids": [f"capture:{p.session}"]},  # attends to the entry's pages at every token
)
"""Explicit memory: what was told, and what was said to it, is kept as an entry of the bank."""


async def tell(client: Client, group: list[Person], memory: Memory = NONE) -> list[Answer]:
    """Tell every person's facts, each in one request."""
    return await asyncio.gather(*(client.chat(user(p.message), memory=memory.tell(p)) for p in group))


async def ask(
    client: Client, group: list[Person], memory: Memory = NONE, history: list[Messages] | None = None
) -> tuple[Recall, list[list[Answer]]]:
    """Ask for every fact, each in a request of its own. history: what stands before the question in the prompt."""

    async def one(i: int, fact: data.Fact) -> Answer:
        messages = [*(history[i] if history else []), *user(data.question(fact))]
        return await client.chat(messages, memory=memory.ask(group[i]))

    flat = iter(await asyncio.gather(*(one(i, fact) for i, person in enumerate(group) for fact in person.told)))
    answers, recall = [[next(flat) for _ in person.told] for person in group], Recall()
    for person, said in zip(group, answers, strict=True):
        for fact, answer in zip(person.told, said, strict=True):
            recall.count(len(person.told), data.is_correct(answer.text, fact))
    return recall, answers


async def speed(client: Client, group: list[Person], tokens: int, memory: Memory = NONE) -> Speed:
    """All people at once, one request each, exactly ``tokens`` tokens out."""
    start = time.perf_counter()
    answers = await asyncio.gather(
        *(client.chat(user(p.message), tokens, memory.speed(p), ignore_eos=True) for p in group)
    )
    wall = time.perf_counter() - start
    return Speed(sum(a.tokens for a in answers) / wall, statistics.median(a.ttft for a in answers))
