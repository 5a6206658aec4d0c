"""What a person sees of the demo, and what a file keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.common.client import Answer
from benchmarks.common.engines import Engine
from benchmarks.common.statistics import median_and_range, wilson
from benchmarks.demo.measure import Person, Recall, Speed
from benchmarks.recall import data

QUIET = 0.15  # share of the cores that other work may take before speeds are called noise
NOWHERE, IN_PROMPT = "stock, facts nowhere", "stock, facts in the prompt"
STATE_ALONE, NO_SESSION = "δ-mem, facts in its state", "δ-mem, no session named"
ENTRY_ALONE, NO_ENTRY = "bank, facts in an entry", "bank, no entry named"


@dataclass
class Results:
    """Everything that one run found out.

    recall: row label -> Recall. speed: server -> one Speed per repeat. other_work: share of all cores that was busy
    while the servers rested, before or after the speed test, whichever was more.
    """

    people: list[Person]
    recall: dict[str, Recall] = field(default_factory=dict)
    speed: dict[str, list[Speed]] = field(default_factory=dict)
    speed_tokens: int = 0
    other_work: float = 0.0


def show_dialogue(
    console: Console, fields_in: str, person: Person, heard: Answer, answers: dict[str, list[Answer]]
) -> None:
    """The first session: what it was told, then each question in a prompt of its own, answered by every server.

    fields_in: the part of a request that takes the memory fields.
    """
    console.print()
    console.rule(f"[bold]session {person.session}: told once, asked later", align="left", style="dim")
    console.print(
        f'\n[dim]request 1   δ-mem: {fields_in} {{"mem_session": "{person.session}"}}, '
        f'bank: {fields_in} {{"mem_capture": "{person.session}", "mem_capture_answer": 1}}'
    )
    console.print(Text.assemble(("  user       ", "bold"), person.message))
    console.print(Text.assemble(("  assistant  ", "bold"), heard.text))
    for i, fact in enumerate(person.told):
        console.print(f"\n[dim]request {i + 2}   a new prompt: the question and nothing else")
        console.print(Text.assemble(("  user       ", "bold"), data.question(fact)))
        for name, said in answers.items():
            answer = said[i]
            good = data.is_correct(answer.text, fact)
            mark = ("  ✓ right", "green") if good else ("  ✗ wrong", "red")
            console.print(Text.assemble((f"  {name:<9}  ", "bold"), answer.text or "(nothing)", mark))


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _share(right: int, asked: int) -> str:
    low, high = wilson(right, asked)
    return f"{right / asked:6.1%}  [{low:.0%}, {high:.0%}]"


def show_recall(console: Console, results: Results) -> None:
    sizes = sorted({len(p.told) for p in results.people})
    asked = sum(len(p.told) for p in results.people)
    table = _table(f"Recall: {asked} questions to {len(results.people)} people")
    table.add_column("the same questions", no_wrap=True)
    table.add_column("right  [95 %]", justify="right", no_wrap=True)
    for n in sizes:
        table.add_column(f"{n} fact{'s' * (n > 1)}", justify="right", no_wrap=True)
    for name, recall in results.recall.items():
        style = "bold green" if name in (STATE_ALONE, ENTRY_ALONE) else None
        cells = [f"{recall.right[n] / recall.asked[n]:.0%}" for n in sizes]
        table.add_row(name, _share(*recall.total()), *cells, style=style)
    console.print(table)


def show_speed(console: Console, results: Results, machine: dict[str, Any]) -> None:
    kind = machine["gpu"] or "a CPU: says nothing about a GPU"
    table = _table(f"Speed on {kind}")
    table.add_column("server")
    table.add_column("output tokens/s", justify="right", no_wrap=True)
    table.add_column("median TTFT, ms", justify="right", no_wrap=True)
    for name, repeats in results.speed.items():
        rate = median_and_range(s.tokens_per_second for s in repeats)
        ttft = median_and_range(1000 * s.ttft for s in repeats)
        table.add_row(name, *("{:,.0f}  [{:,.0f}, {:,.0f}]".format(*x) for x in (rate, ttft)))
    for name, pair in ratios(results).items():
        table.add_row(f"{name} / stock", *("×{:.2f}  [{:.2f}, {:.2f}]".format(*x) for x in pair), style="bold")
    console.print(table)
    load = f"{len(results.people)} requests at once, {results.speed_tokens} tokens each"
    console.print(
        f"[dim]{load}; all servers stay up and are measured in turns.\n"
        f"Median \\[smallest, largest] of {len(results.speed['stock'])} repeats. Every δ-mem request starts from its "
        "session's state, writes it at\neach token and commits it; every bank request attends to its entry."
    )
    if results.other_work > QUIET:
        console.print(
            f"[yellow]Other work kept {results.other_work:.0%} of this machine's cores busy: the speeds above are "
            "mostly noise. Repeat the run on a quiet machine."
        )


Spread = tuple[float, float, float]
"""Median, smallest, largest."""


def ratios(results: Results) -> dict[str, tuple[Spread, Spread]]:
    """(tokens per second, TTFT) of each server with memory over the stock one, paired repeat by repeat."""
    stock, *others = results.speed.items()
    found = {}
    for name, repeats in others:
        pairs = list(zip(stock[1], repeats, strict=True))
        found[name] = (
            median_and_range(m.tokens_per_second / s.tokens_per_second for s, m in pairs),
            median_and_range(m.ttft / s.ttft for s, m in pairs),
        )
    return found


def as_json(
    head: dict[str, Any], results: Results, engine: Engine, commands: list[str], weights: dict[str, str]
) -> dict[str, Any]:
    """Everything needed to read the figures later, and to get them again. head: of ``record.about``."""
    recall = {}
    for name, counted in results.recall.items():
        right, asked = counted.total()
        by_facts = {str(n): [counted.right[n], counted.asked[n]] for n in sorted(counted.asked)}
        recall[name] = {
            "right": right,
            "asked": asked,
            "wilson_95": wilson(right, asked),
            "right_asked_by_facts": by_facts,
        }
    return head | {
        "engine": engine.title,
        "servers": commands,
        "weights_sha256": weights,
        "sessions": len(results.people),
        "recall": recall,
        "speed": {
            "tokens_per_request": results.speed_tokens,
            "other_work_share_of_cores": results.other_work,
            "repeats": {name: [vars(s) for s in repeats] for name, repeats in results.speed.items()},
            "over_stock": {
                name: {"tokens_per_second": rate, "ttft": ttft} for name, (rate, ttft) in ratios(results).items()
            },
        },
    }
