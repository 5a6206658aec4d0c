"""The course: adapters, one server with three models, the questions in four ways, one of them turn by turn."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.common import record
from benchmarks.common.client import Client, connected, user
from benchmarks.common.engines import ENGINES, require_packages
from benchmarks.common.running import demonstration, running
from benchmarks.common.server import MemoryFlags, Server, choose_ports, require_folder, usual_dtype
from benchmarks.memo import corpora
from benchmarks.memo.rows import KINDS, Question, Way, chosen, ways
from mem_triton.cli.model import ModelError, make
from mem_triton.runtime.serving import Serving

CACHE = Path(".cache")
SHIPPED = Path(__file__).parent / "adapters"
AT_ONCE = 16
SECTION = {
    "memory": "memo",
    "executive": "executive",
    "name": "M+memo",
    "executive_schema": "compact",
    "instructed": False,
    "executive_tokens": 96,
    "memory_tokens": 32,
    "history_bytes": 2000,
    "call_seconds": 240.0,  # a busy machine of two cores is slow, and a call that takes long is no failure
    "budget": {"seconds": 900.0},
}
"""How the protocol asks: a small executive that was trained on its turns."""
TRAINED = {"memory": ("--epochs", "7"), "executive": ("--epochs", "3")}
"""Adapter -> the options with which it is trained, beside the preset."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=0, help="How many, as many of each kind; 0: all.")] = 40,
    train: Annotated[bool, typer.Option("--train", help="Train both adapters anew, some 20 CPU minutes.")] = False,
    adapters: Annotated[Path, typer.Option(help="A folder with memory and executive.")] = SHIPPED,
    dtype: Annotated[str, typer.Option(help="Of the model.", show_default="bfloat16 on a GPU")] = "",
    keep_log: Annotated[bool, typer.Option("--keep-log", help="Keep the server's log.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
) -> None:
    """Serve SmolLM2-135M-Instruct with a memory adapter and an executive adapter, and ask about an invented world.

    One vLLM server holds all three, and answers under the name M+memo by MeMo's protocol. It is a real process, reached
    over HTTP; it ends with the demo.
    """
    console, begin = Console(highlight=False), time.monotonic()
    head = record.about("MeMo: a memory model beside the model", "python -m benchmarks.memo")
    dtype = dtype or usual_dtype()
    with demonstration(console, keep_log, ModelError, OSError) as logs:
        require_packages(ENGINES["vllm"])
        make("smollm2", model := CACHE / f"smollm2-{dtype}", dtype)
        if train:
            adapters = trained(model, dtype)
        for name in TRAINED:
            require_folder(adapters / name, "adapter_model.safetensors", "--adapters", f"{name} adapter")
        server = make_server(model, dtype, adapters, logs)
        console.print(f"[bold]{server.name:<8}[/] {escape(server.shown_command)}")
        asked = chosen(questions)
        with running([server], console):
            found, single, calls = asyncio.run(_course(console, server, asked))
        show(console, found, asked, single, calls)
        console.print(f"[dim]{time.monotonic() - begin:.0f} s in all[/]")
        if save:
            facts = {"model": "smollm2", "dtype": dtype, "seed": corpora.WORLD.seed, "section": SECTION}
            facts["adapters_sha256"] = record.digests(*(adapters / name for name in TRAINED))
            ways_found = {way.name: way.figures(asked) for way in found}
            report = head | facts | {"ways": ways_found, "memory_calls": calls, "one_question": single}
            console.print(f"kept in {record.save(report, 'memo').relative_to(record.ROOT)}")


def trained(model: Path, dtype: str) -> Path:
    """Write the corpora and train both adapters as the shipped ones were; the folder of both."""
    folder = CACHE / "memo" / "adapters"
    corpora.write(folder.parent / "corpora")
    for name, options in TRAINED.items():
        command = [sys.executable, "-m", "mem_triton.cli", "train", "memo", str(folder.parent / "corpora" / name)]
        command += [str(folder / name), "--model", str(model), "--preset", "small", "--dtype", dtype, *options]
        if subprocess.run(command).returncode:
            raise OSError(f"training the {name} adapter failed, see above; the same command goes on")
    return folder


def make_server(model: Path, dtype: str, adapters: Path, logs: Path) -> Server:
    """vLLM with the base as M, both adapters, and both together as M+memo."""
    folders = {"memo": adapters / "memory", "executive": adapters / "executive"}
    serving = Serving("vllm", str(model), {"memo": SECTION}, folders)
    memory = MemoryFlags(serving.options(), serving.environment)
    (port,) = choose_ports(None, 1)
    return Server("memo", ENGINES["vllm"].launch(model, "M", dtype, AT_ONCE), memory, port, logs / "memo.log")


async def _course(
    console: Console, server: Server, asked: list[Question]
) -> tuple[list[Way], dict[str, Any], dict[str, Any]]:
    found = ways()
    async with connected([server], AT_ONCE, ENGINES["vllm"].fields_in) as clients:
        client = clients[server.name]
        with console.status("asking") as status:
            for way in found:
                status.update(f"asking {len(asked)} questions: {way.name}")
                await way.ask(client, asked)
            status.update("one question turn by turn")
            single = await _one(server.url, next(one for one in asked if one.kind == KINDS[1]))
            status.update("memory calls one by one and at once")
            calls = await _calls(client)
    return found, single, calls


async def _one(url: str, question: Question) -> dict[str, Any]:
    """A question to M+memo with what it asked and heard."""
    body = {"model": "M+memo", "messages": user(question.text), "temperature": 0}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        said = (await http.post("/v1/chat/completions", json=body)).json()
    message = said["choices"][0]["message"]
    turns = (message.get("reasoning_content") or "").strip().splitlines()
    return {"question": question.text, "value": question.value, "turns": turns, "answer": message["content"]}


async def _calls(client: Client, count: int = 24) -> dict[str, Any]:
    """Seconds of so many memory calls one by one, and at once."""
    texts = [one.text for one in chosen(0)[: 2 * count]]
    begin = time.perf_counter()
    for text in texts[:count]:
        await client.chat(user(text), 24, model="memo")
    alone = time.perf_counter() - begin
    begin = time.perf_counter()
    await asyncio.gather(*(client.chat(user(text), 24, model="memo") for text in texts[count:]))
    together = time.perf_counter() - begin
    return {"calls": count, "one_by_one_s": round(alone, 2), "at_once_s": round(together, 2), "at_a_time": AT_ONCE}


def show(
    console: Console, found: list[Way], asked: list[Question], single: dict[str, Any], calls: dict[str, Any]
) -> None:
    """The table, one question turn by turn, and the memory calls."""
    title = f"\nSmolLM2-135M-Instruct and its two adapters: {len(asked)} questions about an invented world"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("asked", no_wrap=True)
    for column in (*KINDS, "prompt tokens", "seconds"):
        table.add_column(column, justify="right")
    for way in found:
        figures = way.figures(asked)
        cells = [f"{one['right']} of {one['questions']}" for one in figures["by_kind"].values()]
        table.add_row(way.name, *cells, f"{figures['prompt_tokens']:.0f}", f"{figures['seconds']:.0f}")
    console.print(table)
    console.print(f"[bold]One question[/] {escape(single['question'])}")
    for line in single["turns"]:
        console.print(Text(f"  {line}", "dim"))
    console.print(Text.assemble("  answer: ", (single["answer"], "bold"), f"  (right: {single['value']})"))
    told = f"{calls['one_by_one_s']:.1f} s one by one, {calls['at_once_s']:.1f} s at once"
    console.print(f"\n{calls['calls']} memory calls: {told}")


def main() -> None:
    """Entry point of ``python -m benchmarks.memo``."""
    app(prog_name="python -m benchmarks.memo")
