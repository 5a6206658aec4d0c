"""Questions about documents of one's own, over HTTP, with the documents as text in the prompt and as a bank::

    python -m benchmarks.quality .cache/smollm2-float32 --save

The bank is what ``mem-triton write MODEL BANK FOLDER`` makes. Servers run one after the other: a stock one, whose
prompts hold the text, and one with the bank for each temperature. The documents of a question are the same for all.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import record
from benchmarks.common.client import Answer, Client, connected, user
from benchmarks.common.engines import ENGINES, require_packages
from benchmarks.common.running import running
from benchmarks.common.server import BenchmarkError, Server, choose_ports, require_folder
from benchmarks.common.statistics import wilson
from benchmarks.quality.data import Document, Question, attached, load
from benchmarks.quality.scores import exact, f1, interval, says
from mem_triton.store.bank import Bank

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Asked = tuple[str, dict[str, Any] | None]
"""A user's message, and its memory fields."""
Make = Callable[[int], Asked]


@dataclass(frozen=True)
class Row:
    """One way to answer all questions. documents: attached to each; mean: of the answers' figures.

    prompt_tokens: median, that the engine reads; ttft: median seconds of requests that have the server for themselves,
    None if there were none.
    """

    way: str
    documents: int
    asked: int
    says: float
    says_interval: tuple[float, float]
    exact: float
    exact_interval: tuple[float, float]
    f1: float
    f1_interval: tuple[float, float]
    prompt_tokens: float
    ttft: float | None


@app.command()
def quality(
    model: Annotated[Path, typer.Argument(help="The model's folder.")],
    documents: Annotated[str, typer.Option(help="How many documents are attached.")] = "1,2,5,10",
    temperatures: Annotated[str, typer.Option(help="Of the attention to references.")] = "1.0,0.9",
    every: Annotated[int, typer.Option(min=1, help="Ask each so many-th question.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 24,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    alone: Annotated[int, typer.Option(min=0, help="Requests that have the server for themselves, for TTFT.")] = 8,
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    dtype: Annotated[str, typer.Option(help="The servers' --dtype.")] = "float32",
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
) -> None:
    """Compare documents as text with documents as memory, on one model."""
    console = Console(highlight=False)
    head = record.about("documents of one's own: text and memory", "python -m benchmarks.quality")
    texts, questions = load()
    questions, counts = questions[::every], [int(count) for count in documents.split(",")]
    with tempfile.TemporaryDirectory(prefix="mem_triton-quality-") as name:
        folder = Path(name)
        try:
            require_packages(ENGINES[engine])
            require_folder(model, "config.json", "MODEL", "model")
            bank = write_bank(model, folder, texts)
            run = Run(ENGINES[engine], model, dtype, folder, bank, questions, tokens, at_once, alone, console)
            rows, answers = run.side("stock", None, as_text(texts, questions, counts, bank))
            for temperature in map(float, temperatures.split(",")):
                more, said = run.side(f"T={temperature:g}", temperature, as_memory(texts, questions, counts))
                rows, answers = rows + more, answers | said
        except BenchmarkError as error:
            Console(stderr=True, highlight=False).print(str(error), style="bold red", markup=False)
            raise typer.Exit(1) from None
        sizes = bank_sizes(bank)
    same = one_is_its_text(answers)
    show(console, rows, sizes, same)
    if save:
        facts = {"model": str(model), "weights_sha256": record.digests(model), "dtype": dtype, "engine": engine}
        path = record.save(
            head
            | facts
            | {
                "bank": sizes,
                "equal_answers_of_one_document": same,
                "rows": [asdict(row) for row in rows],
                "answers": answers,
            },
            f"quality-{engine}",
        )
        console.print(f"kept in {path.relative_to(record.ROOT)}")


def write_bank(model: Path, folder: Path, documents: dict[str, Document]) -> Path:
    """The bank of all documents, by the command that users have. Raises BenchmarkError."""
    (folder / "documents").mkdir()
    for document in documents.values():
        (folder / "documents" / f"{document.id}.txt").write_text(document.text + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mem_triton.cli", "write", str(model), str(folder / "bank")]
    done = subprocess.run([*command, str(folder / "documents"), "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"The bank could not be written: {done.stderr.strip()}")
    return folder / "bank"


def bank_sizes(path: Path) -> dict[str, Any]:
    """Tokens and bytes of a bank's keys and values."""
    with Bank.open(path) as bank:
        entries = bank.list(limit=1 << 20)
        block = bank.load(entries[0].ref)
        one = 2 * block.keys.numel() * block.keys.element_size() // block.tokens
        tokens = sum(entry.tokens for entry in entries)
        spec = bank.spec.model_dump(mode="json")
    chosen = {name: spec[name] for name in ("kind", "prefix_text", "reference_tokens", "overlap_tokens", "temperature")}
    return {"entries": len(entries), "tokens": tokens, "bytes_per_token": one, "bytes": one * tokens, **chosen}


def as_text(
    documents: dict[str, Document], questions: list[Question], counts: list[int], bank: Path
) -> dict[tuple[str, int], Make]:
    """Ways without memory: the question alone, the documents before it, and what the bank's search finds before it."""

    def before(ids: list[str], i: int) -> Asked:
        return "\n".join([*(documents[id].text for id in ids), questions[i].text]), None

    ways: dict[tuple[str, int], Make] = {("no documents", 0): lambda i: (questions[i].text, None)}
    for count in counts:
        chosen = attached(questions, documents, count)
        ways["text in the prompt", count] = lambda i, chosen=chosen: before(chosen[i], i)
    with Bank.open(bank) as opened:
        for count in counts:
            found = [[h.ref.partition(":")[0] for h in opened.search(q.text, top_k=count)] for q in questions]
            ways["text, retrieved", count] = lambda i, found=found: before(found[i], i)
    return ways


def as_memory(
    documents: dict[str, Document], questions: list[Question], counts: list[int]
) -> dict[tuple[str, int], Make]:
    """Ways with memory: named entries, and retrieved ones."""
    ways: dict[tuple[str, int], Make] = {}
    for count in counts:
        chosen = attached(questions, documents, count)
        ways["parallel", count] = lambda i, chosen=chosen: (questions[i].text, {"mem_ids": chosen[i]})
        ways["parallel, retrieved", count] = lambda i, count=count: (questions[i].text, {"mem_top_k": count})
    return ways


@dataclass(frozen=True)
class Run:
    """What all servers of a run share."""

    engine: Any
    model: Path
    dtype: str
    folder: Path
    bank: Path
    questions: list[Question]
    tokens: int
    at_once: int
    alone: int
    console: Console

    def side(
        self, name: str, temperature: float | None, ways: dict[tuple[str, int], Make]
    ) -> tuple[list[Row], dict[str, list[str]]]:
        """The rows and answers of one server. temperature: None for a stock one."""
        section = {"bank": str(self.bank), "pool_gib": 0.5, "temperature": temperature, "retrieval": {"top_k": 5}}
        memory = self.engine.memory(None if temperature is None else {"memory": section}, self.folder / f"{name}.yaml")
        launch = self.engine.launch(self.model, "recall", self.dtype, self.at_once)
        server = Server(name, launch, memory, choose_ports(None, 1)[0], self.folder / f"{name}.log")
        with running([server], self.console):
            return asyncio.run(self._ask(server, temperature, ways))

    async def _ask(
        self, server: Server, temperature: float | None, ways: dict[tuple[str, int], Make]
    ) -> tuple[list[Row], dict[str, list[str]]]:
        rows, said = [], {}
        async with connected([server], self.at_once, self.engine.fields_in) as clients:
            client = clients[server.name]
            for (way, count), make in ways.items():
                way = way if temperature is None else f"{way}, T={temperature:g}"
                alone = [await self._one(client, make(i)) for i in range(min(self.alone, len(self.questions)))]
                asked = (self._one(client, make(i)) for i in range(len(self.questions)))
                answers = list(await asyncio.gather(*asked))
                rows.append(self._row(way, count, answers, alone))
                said[f"{way}, {count}"] = [answer.text for answer in answers]
                print(f"{way}, {count}: says {rows[-1].says:.3f} F1 {rows[-1].f1:.3f}", file=sys.stderr, flush=True)
        return rows, said

    async def _one(self, client: Client, asked: Asked) -> Answer:
        return await client.chat(user(asked[0]), self.tokens, asked[1])

    def _row(self, way: str, count: int, answers: list[Answer], alone: list[Answer]) -> Row:
        pairs = [(answer.text, question.answers) for answer, question in zip(answers, self.questions, strict=True)]
        right, whole = sum(says(*pair) for pair in pairs), sum(exact(*pair) for pair in pairs)
        scores = [f1(*pair) for pair in pairs]
        asked = len(pairs)
        return Row(
            way,
            count,
            asked,
            right / asked,
            wilson(right, asked),
            whole / asked,
            wilson(whole, asked),
            statistics.fmean(scores),
            interval(scores),
            statistics.median(answer.prompt for answer in answers),
            statistics.median(answer.ttft for answer in alone) if alone else None,
        )


def one_is_its_text(answers: dict[str, list[str]]) -> str | None:
    """How many answers with one entry are those with its text, character for character; None if not asked."""
    text, memory = answers.get("text in the prompt, 1"), answers.get("parallel, T=1, 1")
    if text is None or memory is None:
        return None
    return f"{sum(a == b for a, b in zip(text, memory, strict=True))} of {len(text)}"


def show(console: Console, rows: list[Row], sizes: dict[str, Any], same: str | None) -> None:
    """Print the table."""
    table = Table("way", "documents", "says it", "F1", "exact", "prompt tokens", "TTFT ms")
    for row in rows:
        cells = [
            f"{100 * v:.0f} % ({100 * a:.0f} to {100 * b:.0f})"
            for v, (a, b) in ((row.says, row.says_interval), (row.f1, row.f1_interval), (row.exact, row.exact_interval))
        ]
        table.add_row(
            row.way,
            str(row.documents),
            *cells,
            f"{row.prompt_tokens:.0f}",
            "-" if row.ttft is None else f"{1000 * row.ttft:.0f}",
        )
    console.print(table)
    console.print(f"bank: {json.dumps(sizes)}; answers with one entry that are those with its text: {same}")
