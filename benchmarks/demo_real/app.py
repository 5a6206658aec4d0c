"""The course: make the model, write the bank, start the servers, ask, tell, restart, ask again, show."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.common import record
from benchmarks.common.client import connected
from benchmarks.common.engines import ENGINES, Engine, EngineName, require_packages
from benchmarks.common.running import demonstration, running
from benchmarks.common.server import Server, choose_ports, usual_dtype
from benchmarks.demo_real import conversation, documents, report
from benchmarks.quality.app import bank_sizes, write_bank
from benchmarks.quality.data import Document, Question, load
from mem_triton.cli.model import ModelError, make
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.write import WriteConfig, bank_spec

MODEL = Path(".cache")
AT_ONCE = 8

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    engine: Annotated[EngineName, typer.Option(help="What serves.")] = EngineName.vllm,
    questions: Annotated[int, typer.Option(min=1, help="Questions about documents.")] = 24,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of model, bank and servers.", show_default="bfloat16 on a GPU")] = "",
    keep_log: Annotated[bool, typer.Option("--keep-log", help="Keep the servers' logs.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Keep what was shown as a picture.")] = None,
) -> None:
    """Serve SmolLM2-135M-Instruct, ask it about a folder of documents with and without memory, and tell it facts.

    The weights come from a Python package, nothing is downloaded. A stock server, one with a bank of the documents and
    one that keeps conversations are real processes, reached over HTTP; they end with the demo.
    """
    served_by, begin = ENGINES[engine.value], time.monotonic()
    console = Console(record=svg is not None, width=110 if svg else None, highlight=False)
    head = record.about("a real model: documents as text and as memory", "python -m benchmarks.demo_real")
    dtype = dtype or usual_dtype()
    with demonstration(console, keep_log, ModelError, OSError) as logs:
        require_packages(served_by)
        make("smollm2", model := MODEL / f"smollm2-{dtype}", dtype)
        texts, asked = load()
        chosen = asked[:: max(1, len(asked) // questions)][:questions]
        with console.status("writing the documents into a bank"):
            bank = write_bank(model, logs, texts)
        console.print(report.written(len(texts), bank_sizes(bank)))
        servers = make_servers(served_by, model, dtype, bank, logs)
        for server in servers:
            console.print(f"[bold]{server.name:<13}[/] {escape(server.shown_command)}")
        with running(servers, console):
            course = _course(console, served_by, servers, texts, chosen, tokens, bank)
            answers, talk = asyncio.run(course)
        report.show_documents(console, answers, chosen)
        report.show_conversation(console, talk)
        console.print(f"[dim]{time.monotonic() - begin:.0f} s in all[/]")
        if svg:
            svg.parent.mkdir(parents=True, exist_ok=True)
            console.save_svg(str(svg), title="make demo MODEL=smollm2")
        if save:
            facts = {"model": "smollm2", "dtype": dtype, "weights_sha256": record.digests(model)}
            found = head | facts | {"engine": served_by.title, "bank": bank_sizes(bank)}
            path = record.save(found | report.as_json(answers, talk), f"demo-real-{engine.value}")
            console.print(f"kept in {path.relative_to(record.ROOT)}")


def make_servers(engine: Engine, model: Path, dtype: str, bank: Path, folder: Path) -> list[Server]:
    """The stock server, the one with the documents, and the one that keeps what it is told."""
    launch = engine.launch(model, "recall", dtype, AT_ONCE)
    Bank.create(folder / "talks", bank_spec(WriteConfig(kind="prefix"), model_fingerprint(model))).close()
    sections = {
        "stock": None,
        "documents": {"memory": {"bank": str(bank), "pool_gib": 0.5, "retrieval": {"top_k": 1}}},
        "conversations": {"memory": {"bank": str(folder / "talks"), "pool_gib": 0.1, "capture": "own"}},
    }
    return [
        Server(name, launch, engine.memory(section, folder / f"{name}.yaml"), port, folder / f"{name}.log")
        for (name, section), port in zip(sections.items(), choose_ports(None), strict=True)
    ]


async def _course(
    console: Console,
    engine: Engine,
    servers: list[Server],
    texts: dict[str, Document],
    chosen: list[Question],
    tokens: int,
    bank: Path,
) -> tuple[list[documents.Way], conversation.Talk]:
    """Everything that is asked of the running servers."""
    stock, with_documents, with_talks = servers
    async with connected(servers, AT_ONCE, engine.fields_in) as clients:
        with console.status("asking") as status:
            ways = documents.ways(clients[stock.name], clients[with_documents.name], texts, chosen, bank)
            for way in ways:
                status.update(f"asking {len(chosen)} questions: {way.name}")
                await way.ask(chosen, tokens)
            status.update("telling facts")
            talk = conversation.Talk()
            await talk.tell(clients[with_talks.name])
    with console.status("starting the server of conversations anew"):
        with_talks.stop()
        with_talks.start()
        with_talks.wait(lambda line: None)
    async with connected([stock, with_talks], AT_ONCE, engine.fields_in) as clients:
        await talk.ask(clients[stock.name], clients[with_talks.name])
    return ways, talk


def main() -> None:
    """Entry point of ``python -m benchmarks.demo_real``."""
    app(prog_name="python -m benchmarks.demo_real")
