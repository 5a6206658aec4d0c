"""Trains cartridges of several sizes for one document, and asks held-out questions each way there is to ask::

    python -m benchmarks.cartridges MODEL OUT --save

The document is some of the invented ones of ``benchmarks.quality``, one after the other, and the held-out questions are
theirs; no run is trained on them, the model asks itself others. Each size is one run of `mem-triton train cartridge`,
by the command that users have; one that was stopped goes on. The questions that the model asks itself in the first run
are those of all. Replies are scored here, by all right answers of a question, from the file that the command leaves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import record
from benchmarks.common.server import BenchmarkError, require_folder
from benchmarks.common.statistics import wilson
from benchmarks.quality.data import Document, Question, load
from benchmarks.quality.scores import says

WAYS = ("nothing", "first rows", "cartridge", "text in the context")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def cartridges(
    model: Annotated[Path, typer.Argument(help="The model's folder.")],
    out: Annotated[Path, typer.Argument(help="A folder for the document, the questions and the runs.")],
    rows: Annotated[str, typer.Option(help="Sizes.")] = "64,128,256",
    documents: Annotated[int, typer.Option(min=1, help="Documents that are joined to one.")] = 10,
    steps: Annotated[int, typer.Option(min=1)] = 150,
    asked: Annotated[int, typer.Option(min=2, help="Questions that the model asks itself.")] = 96,
    dtype: Annotated[str, typer.Option(help="Of the frozen model.")] = "float32",
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
) -> None:
    """Compare nothing, a document's first rows, cartridges and the text in the context on held-out questions."""
    console = Console(highlight=False)
    head = record.about("recall of trained cartridges", "python -m benchmarks.cartridges")
    texts, questions = chosen(documents)
    options = {"steps": steps, "asked": asked, "dtype": dtype}
    try:
        require_folder(model, "config.json", "MODEL", "model")
        document, held_out = write_inputs(out, texts, questions)
        runs, own = [], None
        for size in map(int, rows.split(",")):
            given = {"rows": size, **options, **({} if own is None else {"questions": own})}
            runs.append(trained(model, document, held_out, out / f"rows-{size}", given))
            own = own or out / f"rows-{size}" / "questions.jsonl"
    except BenchmarkError as error:
        Console(stderr=True, highlight=False).print(str(error), style="bold red", markup=False)
        raise typer.Exit(1) from None
    found = [scored(run, questions) for run in runs]
    show(console, found)
    if save:
        facts = {"model": str(model), "weights_sha256": record.digests(model), "documents": [d.id for d in texts]}
        path = record.save(head | facts | options | {"runs": found}, "cartridges")
        console.print(f"kept in {path.relative_to(record.ROOT)}")


def chosen(count: int) -> tuple[list[Document], list[Question]]:
    """The first documents of facts in English, and their questions."""
    documents, questions = load()
    texts = [one for one in documents.values() if (one.kind, one.language) == ("facts", "en")][:count]
    ids = {one.id for one in texts}
    return texts, [question for question in questions if question.document in ids]


def write_inputs(out: Path, texts: Sequence[Document], questions: Sequence[Question]) -> tuple[Path, Path]:
    """The document and the held-out questions as files of the command."""
    out.mkdir(parents=True, exist_ok=True)
    document, held_out = out / "document.txt", out / "held-out.jsonl"
    document.write_text("\n\n".join(one.text for one in texts) + "\n", encoding="utf-8")
    lines = ({"question": one.text, "answer": one.answers[0]} for one in questions)
    held_out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return document, held_out


def trained(model: Path, document: Path, held_out: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The report of one run. Raises BenchmarkError."""
    command = [sys.executable, "-m", "mem_triton.cli", "train", "cartridge", str(model), str(document), str(out)]
    command += ["--held-out", str(held_out), "--json"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchmarkError(f"training {out} failed, see above; the same command goes on")
    return json.loads(done.stdout) | {"all_seconds": round(time.monotonic() - begin, 1)}


def scored(report: dict[str, Any], questions: Sequence[Question]) -> dict[str, Any]:
    """A run with how often each way said a right answer, and its 95 % Wilson interval."""
    text = Path(report["replies"]).read_text(encoding="utf-8")
    replies = [json.loads(line) for line in text.splitlines()]
    ways = {}
    for way in WAYS:
        pairs = zip(replies, questions, strict=True)
        right = sum(says(reply[way], question.answers) for reply, question in pairs)
        ways[way] = {"right": right, "interval": wilson(right, len(questions))}
    names = ("rows", "document_tokens", "lessons", "divergence", "seconds", "cpu_seconds", "all_seconds")
    return {name: report[name] for name in names} | {"asked": len(questions), "ways": ways, "replies": replies}


def show(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("rows", *WAYS, "divergence", "CPU s")
    for run in runs:
        cells = []
        for found in run["ways"].values():
            low, high = found["interval"]
            cells.append(f"{found['right']} of {run['asked']} ({100 * low:.0f} to {100 * high:.0f} %)")
        table.add_row(str(run["rows"]), *cells, f"{run['divergence']['cartridge']:.3f}", f"{run['cpu_seconds']:.0f}")
    console.print(table)
