"""The course: adapters, one server with three models, the questions in four ways, one of them turn by turn."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

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
_STEPS = ("--batch", "8", "--rate", "1e-3")
TRAINED = {"memory": ("--epochs", "12", *_STEPS), "executive": ("--epochs", "2", *_STEPS)}
"""Adapter -> the options with which it is trained, beside the preset."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=0, help="How many, as many of each kind; 0: all.")] = 20,
    calls: Annotated[int, typer.Option(min=1, help="Memory calls one by one, and as many at once.")] = 8,
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
            found, single, told = asyncio.run(_course(console, server, asked, calls))
        show(console, found, asked, single, told)
        console.print(f"[dim]{time.monotonic() - begin:.0f} s in all[/]")
        if save:
            facts = {"model": "smollm2", "dtype": dtype, "seed": corpora.WORLD.seed, "section": SECTION}
            facts["adapters_sha256"] = record.digests(*(adapters / name for name in TRAINED))
            ways_found = {way.name: way.figures(asked) for way in found}
            report = head | facts | {"ways": ways_found, "memory_calls": told, "one_question": single}
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
    console: Console, server: Server, asked: list[Question], count: int
) -> tuple[list[Way], dict[str, Any], dict[str, Any]]:
    found = ways()
    async with connected([server], AT_ONCE, ENGINES["vllm"].fields_in) as clients:
        client = clients[server.name]
        with console.status("asking") as status:
            for way in found:
                status.update(f"asking {len(asked)} questions: {way.name}")
                await way.ask(client, asked)
            status.update("memory calls one by one and at once")
            calls = await _calls(client, count)
    return found, _one(next(way for way in found if way.model == "M+memo"), asked), calls


def _one(way: Way, asked: list[Question]) -> dict[str, Any]:
    """A question of two hops with what was asked and heard for it."""
    question, answer = next(pair for pair in zip(asked, way.answers, strict=True) if pair[0].kind == KINDS[1])
    turns = answer.progress.strip().splitlines()
    return {"question": question.text, "value": question.value, "turns": turns, "answer": answer.text}


async def _calls(client: Client, count: int) -> dict[str, Any]:
    """Seconds of so many memory calls one by one, and of as many at once; prefix tokens that these found cached."""
    texts = [one.text for one in chosen(0)[: 2 * count]]
    begin = time.perf_counter()
    for text in texts[:count]:
        await client.chat(user(text), 24, model="memo")
    alone = time.perf_counter() - begin
    before, begin = await _prefix_tokens(client), time.perf_counter()
    await asyncio.gather(*(client.chat(user(text), 24, model="memo") for text in texts[count:]))
    together = time.perf_counter() - begin
    looked_up, hit = (now - then for now, then in zip(await _prefix_tokens(client), before, strict=True))
    told = {"calls": count, "one_by_one_s": round(alone, 2), "at_once_s": round(together, 2), "at_a_time": AT_ONCE}
    return told | {"prefix_tokens": looked_up, "prefix_tokens_hit": hit}


async def _prefix_tokens(client: Client) -> tuple[int, int]:
    """(prompt tokens looked up in the prefix cache, those found), of all requests so far."""
    lines = (await client.http.get("/metrics")).text.splitlines()
    queries, hits = (
        sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total{{"))
        for name in ("queries", "hits")
    )
    return int(queries), int(hits)


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
    cached = f"{calls['prefix_tokens_hit']} of {calls['prefix_tokens']} prompt tokens from the prefix cache"
    console.print(f"\n{calls['calls']} memory calls: {told}; {cached}")


def main() -> None:
    """Entry point of ``python -m benchmarks.memo``."""
    app(prog_name="python -m benchmarks.memo")
