"""Runs a build: step after step, each unit one call to the generator, within budgets, until all is done.

What stops it (a generator that is down, a budget, a kill) leaves everything that was made; the same call goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mem_triton.systems.memo.endpoint import Answer, CallError
from mem_triton.systems.memo.protocol.calls import prompt_bound
from mem_triton.systems.memo.protocol.parsing import is_whole, read_reply
from mem_triton.systems.memo.protocol.schemas import json_schema
from mem_triton.systems.memo.protocol.state import Message
from mem_triton.systems.memo.reflections import steps
from mem_triton.systems.memo.reflections.dedupe import duplicates
from mem_triton.systems.memo.reflections.formats import write_all
from mem_triton.systems.memo.reflections.ledger import BuildError, Cost, Ledger, Unit
from mem_triton.systems.memo.reflections.prompts import REPLIES, messages_of
from mem_triton.systems.memo.reflections.settings import STEPS, BuildSettings

SHAPING = (
    "chunk_words",
    "overlap_words",
    "least_pairs",
    "group",
    "batch",
    "cross_batches",
    "paraphrases",
    "unknowns",
)
"""Settings that say what a unit is; they stay what they were when a build was begun."""


class Generator(Protocol):
    """A model that writes: ``endpoint.Endpoint``."""

    model: str

    async def chat(self, messages: list[dict[str, str]], **options: Any) -> Answer: ...


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is: the step, its units that have ended, all of them, and what was spent."""

    step: str
    done: int
    units: int
    cost: Cost
    seconds: float


Watch = Callable[[BuildProgress], None]


class Stopped(Exception):
    """The build ends before its end. reason: for people."""


class Build:
    """One run of a build over a ledger."""

    def __init__(
        self, ledger: Ledger, generator: Generator, settings: BuildSettings, watch: Watch = lambda progress: None
    ) -> None:
        self.ledger, self.generator, self.settings, self.watch = ledger, generator, settings, watch
        self.spent = ledger.cost()
        self.began = time.monotonic()

    async def run(self) -> str:
        """Do what is left; returns why it stopped before the end, "" if it did not. Raises BuildError."""
        self.ledger.fix({name: getattr(self.settings, name) for name in SHAPING})
        try:
            for step in STEPS:
                if step not in self.settings.skip:
                    self.ledger.plan(step, steps.plan(step, self.ledger, self.settings))
                    await self._step(step)
        except ExceptionGroup as several:
            first = several.exceptions[0]
            if isinstance(first, Stopped):
                return str(first)
            raise first from None
        return ""

    async def _step(self, step: str) -> None:
        units = self.ledger.open_units(step)
        ended = 0
        free = asyncio.Semaphore(self.settings.at_once)

        async def work(unit: Unit) -> None:
            nonlocal ended
            async with free:
                await self._unit(unit)
                ended += 1
                self.watch(BuildProgress(step, ended, len(units), self.spent, time.monotonic() - self.began))

        async with asyncio.TaskGroup() as group:
            for unit in units:
                group.create_task(work(unit))

    async def _unit(self, unit: Unit) -> None:
        reason = ""
        for attempt in range(self.settings.tries):
            try:
                answer = await self._hedged(unit)
            except CallError as error:
                if error.too_long or not (error.retryable or error.fatal):
                    self.ledger.fail(unit, str(error))
                    return
                if error.fatal or attempt == self.settings.tries - 1:  # the server, not this unit
                    raise Stopped(f"the generator: {error}") from None
                await asyncio.sleep(max(error.wait, self.settings.backoff * 2**attempt))
                continue
            reply, reason = read_reply(answer.text, REPLIES[unit.step])
            if reply is not None and attempt < self.settings.tries - 1 and not is_whole(answer.text):
                reply, reason = None, "the reply is cut off"  # what was repaired lacks pairs; better than none, at last
            if reply is not None:
                try:
                    pairs, changes = steps.read(unit, reply, self.ledger, self.generator.model)
                except steps.Unusable as error:
                    reason = str(error)
                else:
                    self.ledger.finish(unit, pairs, changes)
                    return
        self.ledger.fail(unit, reason)

    async def _hedged(self, unit: Unit) -> Answer:
        """A call, and where it takes long a second one; the first reply counts, the other call is given up."""
        first = asyncio.create_task(self._call(unit))
        tasks = {first}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self.settings.hedge_seconds)
            if not done:
                tasks.add(asyncio.create_task(self._call(unit)))
            while True:
                done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good:
                    return good[0].result()
                if not waiting:
                    raise next(iter(done)).exception()  # type: ignore[misc]
                tasks = set(waiting)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # not gather, as in the driver

    async def _call(self, unit: Unit) -> Answer:
        settings = self.settings
        messages = messages_of(unit.step, unit.input)
        bound = prompt_bound(tuple(Message(m["role"], m["content"]) for m in messages))
        self._afford(bound, settings.max_tokens)
        call = self.ledger.begin_call(unit.id, bound, settings.max_tokens)
        self._count(Cost(1, bound, settings.max_tokens, 1))
        began = time.monotonic()
        outcome, prompt, completion = "failed", None, None
        try:
            answer = await self.generator.chat(
                messages,
                max_tokens=settings.max_tokens,
                seconds=settings.call_seconds,
                temperature=0.0 if unit.step == "contain" else settings.temperature,
                seed=settings.seed + unit.id,
                schema=(unit.step, json_schema(REPLIES[unit.step])),
            )
            outcome, prompt, completion = "replied", answer.prompt_tokens, answer.completion_tokens
            return answer
        except CallError as error:
            if error.refused:  # nothing was generated
                prompt = completion = 0
            raise
        except asyncio.CancelledError:
            outcome = "lost"
            raise
        finally:
            self.ledger.end_call(call, outcome, prompt, completion, time.monotonic() - began)
            less = (
                0 if prompt is None else prompt - bound,
                0 if completion is None else completion - settings.max_tokens,
            )
            self._count(Cost(0, *less, -(outcome != "lost")))

    def _count(self, more: Cost) -> None:
        spent = self.spent
        self.spent = Cost(
            spent.requests + more.requests,
            spent.prompt_tokens + more.prompt_tokens,
            spent.completion_tokens + more.completion_tokens,
            spent.lost + more.lost,
        )

    def _afford(self, prompt: int, completion: int) -> None:
        """Raise Stopped for a call that does not fit into a budget."""
        budget, spent = self.settings.budget, self.spent
        tokens = spent.prompt_tokens + spent.completion_tokens + prompt + completion
        if budget.requests is not None and spent.requests + 1 > budget.requests:
            raise Stopped(f"the budget of {budget.requests} requests is used up")
        if budget.tokens is not None and tokens > budget.tokens:
            raise Stopped(f"the budget of {budget.tokens} tokens leaves no room for another call")
        price = cost_of(self.settings, Cost(0, spent.prompt_tokens + prompt, spent.completion_tokens + completion))
        if budget.cost is not None and price > budget.cost:
            raise Stopped(f"the budget of {budget.cost:g} leaves no room for another call")


def cost_of(settings: BuildSettings, cost: Cost) -> float:
    """What tokens cost at the prices of the settings."""
    budget = settings.budget
    return (cost.prompt_tokens * budget.prompt_price + cost.completion_tokens * budget.completion_price) / 1e6


def export(ledger: Ledger, folder: Path, settings: BuildSettings) -> dict[str, int]:
    """Write what is there, without pairs that say the same twice; returns rows by file. Raises BuildError."""
    pairs = ledger.pairs()
    again = duplicates(pairs, settings.near)
    sources = {document.id: document.source for document in ledger.documents()}
    try:
        rows = write_all(folder, [pair for pair in pairs if pair.key not in again], sources)
    except OSError as error:
        raise BuildError(
            f"{folder}: {error.strerror or error}; the ledger has all pairs, the same command goes on"
        ) from None
    return {**rows, "duplicates": len(again)}
