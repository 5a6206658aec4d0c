"""The demo's course: start the servers, tell, ask, measure in turns, show. Servers end however it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.common import record
from benchmarks.common.client import connected
from benchmarks.common.engines import ENGINES, Engine, EngineName, require_packages
from benchmarks.common.running import REST, demonstration, running
from benchmarks.common.server import Server, choose_ports, require_folder, usual_dtype
from benchmarks.demo import measure, report
from mem_triton.store.bank import Bank
from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.write import WriteConfig, bank_spec

RECALL = Path("benchmarks/recall")

KINDS = (measure.NONE, measure.SESSION, measure.ENTRY)  # of the servers, in order

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    engine: Annotated[EngineName, typer.Option(help="What serves.")] = EngineName.vllm,
    sessions: Annotated[int, typer.Option(min=1, max=512, help="People who talk to the servers at once.")] = 32,
    facts: Annotated[int, typer.Option(min=1, max=16, help="People are told 1, 2, ... up to so many facts.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Output tokens per request of the speed test.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of the speed test.")] = 5,
    seed: Annotated[int, typer.Option(help="Chooses people and facts.")] = 2026,
    model: Annotated[Path, typer.Option(help="The model's folder.")] = RECALL / "model",
    adapter: Annotated[Path, typer.Option(help="The δ-mem adapter's folder.")] = RECALL / "adapter",
    dtype: Annotated[
        str | None, typer.Option(help="The servers' --dtype.", show_default="float32; bfloat16 on a GPU")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65533, help="First of three ports.", show_default="any free ones")
    ] = None,
    keep_log: Annotated[bool, typer.Option("--keep-log", help="Keep the servers' logs.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Keep what was shown as a picture.")] = None,
) -> None:
    """Tell facts to a small model in one request and ask for them in later ones, on a stock engine and with memory.

    The servers are real processes on this machine, reached over HTTP: a stock one, one whose sessions have a δ-mem
    state, and one with a bank of explicit memory. They end with the demo.
    """
    served_by = ENGINES[engine.value]
    console = Console(record=svg is not None, width=110 if svg else None, highlight=False)
    what = f"{served_by.target}: the same questions to stock {served_by.title} and to {served_by.title} with memory"
    head = record.about(what, "python -m benchmarks.demo")
    with demonstration(console, keep_log) as logs:
        require_packages(served_by)
        require_folder(model, "config.json", "--model", "model")
        require_folder(adapter, "delta_mem_config.json", "--adapter", "δ-mem adapter")
        ports = choose_ports(port)
        stock, *with_memory = servers = make_servers(served_by, model, adapter, dtype, sessions, ports, logs)
        console.print(f"[bold]stock[/]  {escape(stock.shown_command)}")
        for server in with_memory:
            console.print(f"[bold]{server.name:<5}[/]  the same with {escape(server.memory.shown)}")
        console.print()
        with running(servers, console):
            group = measure.people(sessions, facts, seed)
            results = asyncio.run(course(console, served_by, servers, group, tokens, repeats, seed))
        report.show_speed(console, results, head["machine"])
        if svg:
            svg.parent.mkdir(parents=True, exist_ok=True)
            console.save_svg(str(svg), title=served_by.target)
        if save:
            commands = [server.shown_command for server in servers]
            found = report.as_json(head, results, served_by, commands, record.digests(model, adapter))
            path = record.save(found, f"demo-{engine.value}")
            console.print(f"\nkept in {path.relative_to(record.ROOT)}")


def make_servers(
    engine: Engine, model: Path, adapter: Path, dtype: str | None, sessions: int, ports: list[int], folder: Path
) -> list[Server]:
    """The stock server and those with memory; their commands differ in what gives them memory alone."""
    launch = engine.launch(model, "recall", dtype or usual_dtype(), max(8, sessions))
    bank = folder / "bank"
    Bank.create(bank, bank_spec(WriteConfig(kind="prefix"), model_fingerprint(model))).close()
    sections = {
        "stock": None,
        "δ-mem": {"delta": {"adapter": str(adapter)}, "session_dir": str(folder / "sessions")},
        "bank": {"memory": {"bank": str(bank), "pool_gib": 0.1, "capture": "own"}},
    }
    servers = []
    for (name, section), port in zip(sections.items(), ports, strict=True):
        file = folder / f"{name.replace('δ', 'delta')}.yaml"
        servers.append(Server(name, launch, engine.memory(section, file), port, file.with_suffix(".log")))
    return servers


async def course(
    console: Console,
    engine: Engine,
    servers: list[Server],
    group: list[measure.Person],
    tokens: int,
    repeats: int,
    seed: int,
) -> report.Results:
    """Everything that is asked of the running servers. Raises BenchmarkError if one of them dies."""
    kinds = {server.name: kind for server, kind in zip(servers, KINDS, strict=True)}
    results = report.Results(group, speed={name: [] for name in kinds}, speed_tokens=tokens)
    async with connected(servers, len(group), engine.fields_in) as clients:
        plain, session, bank = clients.values()
        with console.status("warming up") as status:
            warm = [measure.Person(f"warm-{i}", p.told, p.message) for i, p in enumerate(group)]
            for name, client in clients.items():
                await measure.tell(client, warm, kinds[name])
                await measure.speed(client, warm, tokens, kinds[name])
            status.update("telling facts to the stock server, asking with the facts in the prompt, and without")
            heard = await measure.tell(plain, group)
            told = [
                [*measure.user(p.message), {"role": "assistant", "content": a.text}]
                for p, a in zip(group, heard, strict=True)
            ]
            in_prompt, _ = await measure.ask(plain, group, history=told)
            nowhere, stock_answers = await measure.ask(plain, group)
            status.update("telling facts to the servers with memory, then asking without them")
            heard = await measure.tell(session, group, measure.SESSION)
            in_state, session_answers = await measure.ask(session, group, measure.SESSION)
            no_session, _ = await measure.ask(session, group)
            await measure.tell(bank, group, measure.ENTRY)
            in_entry, bank_answers = await measure.ask(bank, group, measure.ENTRY)
            no_entry, _ = await measure.ask(bank, group)
            results.recall = {
                report.NOWHERE: nowhere,
                report.IN_PROMPT: in_prompt,
                report.STATE_ALONE: in_state,
                report.NO_SESSION: no_session,
                report.ENTRY_ALONE: in_entry,
                report.NO_ENTRY: no_entry,
            }
        talk = first_talk(group)
        answers = dict(zip(clients, (x[talk] for x in (stock_answers, session_answers, bank_answers)), strict=True))
        report.show_dialogue(console, engine.fields_in, group[talk], heard[talk], answers)
        report.show_recall(console, results)
        with console.status("measuring speed") as status:
            before = await other_work()
            for repeat in range(repeats):
                status.update(f"measuring speed in turns, repeat {repeat + 1} of {repeats}")
                again = measure.people(len(group), max(len(p.told) for p in group), seed + 10_000 * (repeat + 1))
                turns = list(clients.items())
                for name, client in turns[:: 1 if repeat % 2 == 0 else -1]:
                    await asyncio.sleep(REST)
                    results.speed[name].append(await measure.speed(client, again, tokens, kinds[name]))
            results.other_work = max(before, await other_work())
    return results


async def other_work() -> float:
    """Share of all cores that is busy while the servers rest."""
    await asyncio.sleep(REST)
    return await asyncio.to_thread(psutil.cpu_percent, 1.0) / 100


def first_talk(group: list[measure.Person]) -> int:
    """The first session with two facts, or the first at all: chosen before any answer is known."""
    return next((i for i, person in enumerate(group) if len(person.told) == 2), 0)


def main() -> None:
    """Entry point of ``python -m benchmarks.demo``."""
    app(prog_name="python -m benchmarks.demo")
