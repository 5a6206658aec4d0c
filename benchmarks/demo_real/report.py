"""What a person sees of the demo on a real model, and what a file keeps of it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.common.statistics import wilson
from benchmarks.demo_real.conversation import ASKED, TOLD, Talk
from benchmarks.demo_real.documents import Way
from benchmarks.quality.data import Question
from benchmarks.quality.scores import says


def written(documents: int, sizes: dict[str, Any]) -> str:
    """One line about the bank."""
    held = f"{sizes['tokens']:,} tokens, {sizes['bytes'] / 2**20:.0f} MB of keys and values"
    return f"{documents} invented documents are in a bank: {sizes['entries']} entries, {held}\n"


def show_documents(console: Console, ways: list[Way], questions: list[Question]) -> None:
    """The table, and one question with all its answers."""
    title = f"\nSmolLM2-135M-Instruct: {len(questions)} questions about documents"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("the same questions", no_wrap=True)
    for column in ("right  [95 %]", "tokens read", "TTFT, ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for way in ways:
        right, asked = way.right(questions), len(questions)
        low, high = wilson(right, asked)
        share = "" if way.again else f"{right / asked:4.0%}  [{low:.0%}, {high:.0%}]"
        table.add_row(way.name, share, f"{way.prompt_tokens:.0f}", f"{1000 * way.ttft:.0f}")
    console.print(table)
    console.print(f"[bold]One question: {questions[0].text}")
    for way in ways:
        if not way.again:
            _say(console, way.name, way.answers[0].text, questions[0].answers)


def show_conversation(console: Console, talk: Talk) -> None:
    """What was told before the restart, and what was known after it."""
    console.print("\n[bold]A conversation that outlives its server[/]  [dim]told with mem_capture, asked with mem_ids")
    console.print(Text.assemble(("  user       ", "bold"), TOLD))
    console.print(Text.assemble(("  assistant  ", "bold"), talk.heard))
    console.print("[dim]  ... the server is started anew ...")
    for (question, right), (plain, remembered) in zip(ASKED, talk.answers, strict=True):
        console.print(Text.assemble(("  user       ", "bold"), question))
        _say(console, "stock", plain, right)
        _say(console, "with memory", remembered, right)


def _say(console: Console, who: str, text: str, right: tuple[str, ...]) -> None:
    mark = ("  ✓ right", "green") if says(text, right) else ("  ✗ wrong", "red")
    console.print(Text.assemble((f"  {who.strip():<42}", "dim"), " ".join(text.split()) or "(nothing)", mark))


def as_json(ways: list[Way], talk: Talk) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "ways": [
            {
                "name": way.name.strip(),
                "answers": [answer.text for answer in way.answers],
                "prompt_tokens": way.prompt_tokens,
                "ttft_seconds": [answer.ttft for answer in way.alone],
            }
            for way in ways
        ],
        "conversation": {"told": TOLD, "heard": talk.heard, "answers": talk.answers, "right": talk.right()},
    }
