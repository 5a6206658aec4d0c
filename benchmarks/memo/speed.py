"""Measures a memory model as an adapter beside its base, and merged into it: ``python -m benchmarks.memo.speed``.

    python -m benchmarks.memo.speed --rounds 9 --save

Three vLLM servers are up: the base alone, the base with the adapter beside it, and the merged model. They are asked in
turns, as many questions at once as ``--at-once`` says; what is said is the ratio of the rounds. No speed is said unless
adapter and merged model give the same greedy answers in fp32, and the base others. Exit code 1 if they do not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common import record
from benchmarks.common.engines import ENGINES, require_packages
from benchmarks.common.running import REST, demonstration, running
from benchmarks.common.server import BenchmarkError, MemoryFlags, Server, choose_ports, require_folder
from benchmarks.common.statistics import median_and_range
from benchmarks.engines.pairs import ratio
from benchmarks.memo.rows import chosen
from mem_triton.cli.model import ModelError, make
from mem_triton.runtime.serving import Serving
from mem_triton.systems.memo.merging.arithmetic import MergeRecipe
from mem_triton.systems.memo.merging.into_base import merge_into_base

CACHE = Path(".cache")
SHIPPED = Path(__file__).parent / "adapters" / "memory"
RATIOS = (
    ("adapter", "merged"),
    ("adapter", "base"),
    ("merged", "base"),
    ("base beside the adapter", "base"),
)
"""Which sides are compared: of, to."""
ENOUGH = 0.7
"""Share of the merged model's speed below which an adapter is better merged."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class GateError(BenchmarkError):
    """Answers that differ where they must not, or are equal where they must not be."""


@dataclass(frozen=True)
class Side:
    """A model of a server."""

    server: Server
    model: str


@app.command()
def speed(
    at_once: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every side is measured.")] = 9,
    gate: Annotated[int, typer.Option(min=1, help="Questions whose answers are compared first.")] = 32,
    model: Annotated[Path | None, typer.Option(help="The base.", show_default="SmolLM2-135M-Instruct")] = None,
    adapter: Annotated[Path, typer.Option(help="A LoRA adapter of it.")] = SHIPPED,
    keep_log: Annotated[bool, typer.Option("--keep-log", help="Keep the servers' logs.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
) -> None:
    """Measure output tokens a second of a base, a LoRA adapter beside it, and both merged into one model."""
    console = Console(highlight=False)
    head = record.about("a memory model as an adapter, and merged", "python -m benchmarks.memo.speed")
    with demonstration(console, keep_log, ModelError, OSError) as logs:
        require_packages(ENGINES["vllm"])
        require_folder(adapter, "adapter_model.safetensors", "--adapter", "memory adapter")
        if model is None:
            make("smollm2", model := CACHE / "smollm2-float32", "float32")
        merge_into_base(MergeRecipe("linear"), [adapter], model, logs / "merged")
        sides = make_sides(model, adapter, logs / "merged", at_once, logs)
        servers = list(dict.fromkeys(side.server for side in sides.values()))
        for server in servers:
            console.print(f"[bold]{server.name:<8}[/] {escape(server.shown_command)}")
        with running(servers, console):
            compared, found = asyncio.run(measure(console, sides, (at_once, tokens, rounds, gate)))
        told = summary(found)
        show(console, told, at_once)
        if save:
            facts = {"model": str(model), "dtype": "float32", "at_once": at_once, "tokens": tokens, "gate": compared}
            facts["sha256"] = record.digests(model, adapter)
            facts["commands"] = [server.shown_command for server in servers]
            report = head | facts | {"tokens_per_s": found, **told}
            console.print(f"kept in {record.save(report, 'memo-speed').relative_to(record.ROOT)}")


def make_sides(model: Path, adapter: Path, merged: Path, at_once: int, logs: Path) -> dict[str, Side]:
    """What is measured, by name. The servers are stock, but for the options with which ``mem-triton serve`` gives them
    an adapter."""
    folders = {"base": model, "adapter": model, "merged": merged}
    options = Serving("vllm", str(model), {}, {"memo": adapter}).options()
    lora = MemoryFlags(options[options.index("--enable-lora") :])
    servers = {
        name: Server(
            name,
            ENGINES["vllm"].launch(folder, "M", "float32", at_once),
            lora if name == "adapter" else MemoryFlags(),
            port,
            logs / f"{name}.log",
        )
        for (name, folder), port in zip(folders.items(), choose_ports(None, len(folders)), strict=True)
    }
    return {
        "base": Side(servers["base"], "M"),
        "base beside the adapter": Side(servers["adapter"], "M"),
        "adapter": Side(servers["adapter"], "memo"),
        "merged": Side(servers["merged"], "M"),
    }


async def measure(
    console: Console, sides: dict[str, Side], told: tuple[int, int, int, int]
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """What the gate saw, and tokens a second of each side by round. told: at once, tokens, rounds, questions of the
    gate. Raises GateError."""
    at_once, tokens, rounds, gate = told
    texts = [one.text for one in chosen(0)]
    found: dict[str, list[float]] = {name: [] for name in sides}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=200)) as http:
        with console.status("comparing answers"):
            asked = texts[:gate]
            answers = {
                name: [said for text in asked for said in await ask(http, side, [text], 32, whole=False)]
                for name, side in sides.items()
            }
        compared = check(answers)
        console.print(f"[green]✓[/] adapter and merged model answer {compared['equal']} of {gate} questions alike")
        for number in range(rounds + 1):  # the first one warms the servers up
            first = number * at_once % len(texts)
            batch = (texts[first:] + texts * (1 + at_once // len(texts)))[:at_once]
            for name in list(sides)[:: 1 if number % 2 else -1]:
                await asyncio.sleep(REST)
                with console.status(f"round {number} of {rounds}: {name}"):
                    begin = time.perf_counter()
                    await ask(http, sides[name], batch, tokens)
                    took = time.perf_counter() - begin
                if number:
                    found[name].append(round(at_once * tokens / took, 2))
    return compared, found


async def ask(http: httpx.AsyncClient, side: Side, texts: Sequence[str], tokens: int, whole: bool = True) -> list[str]:
    """Greedy answers to these questions, all asked at once. whole: each has so many tokens, whatever the model says.

    Answers come as wholes: streams would keep client and front end busy, too.
    """

    async def one(text: str) -> str:
        body = {"model": side.model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
        body |= {"temperature": 0, "ignore_eos": whole}
        response = await http.post(f"{side.server.url}/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise BenchmarkError(f"{side.server.name}: HTTP {response.status_code}: {response.text[:500]}")
        said = response.json()
        if whole and said["usage"]["completion_tokens"] != tokens:
            raise BenchmarkError(
                f"{side.server.name}: {json.dumps(said['usage'])} where {tokens} tokens were asked for"
            )
        return said["choices"][0]["message"]["content"]

    return await asyncio.gather(*map(one, texts))


def check(answers: dict[str, list[str]]) -> dict[str, int]:
    """How many answers of adapter and merged model are equal: all, and the base's are others. Raises GateError."""

    def equal(one: str, other: str) -> int:
        return sum(a == b for a, b in zip(answers[one], answers[other], strict=True))

    asked = len(answers["adapter"])
    if (same := equal("adapter", "merged")) < asked:
        pairs = zip(answers["adapter"], answers["merged"], strict=True)
        first = next(pair for pair in pairs if pair[0] != pair[1])
        raise GateError(f"adapter and merged model answer {same} of {asked} questions alike; the first others: {first}")
    if (plain := equal("base", "base beside the adapter")) < asked:
        raise GateError(f"the base answers {plain} of {asked} questions alike with an adapter beside it and without")
    if (silent := equal("adapter", "base")) == asked:
        raise GateError("the adapter changes no answer: nothing is compared")
    return {"questions": asked, "equal": same, "base_equal_to_adapter": silent}


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Median and range of each side, and the ratios of rounds with 95 % intervals."""
    return {
        "sides": {
            name: dict(zip(("median", "min", "max"), median_and_range(v), strict=True)) for name, v in found.items()
        },
        "ratios": {f"{of} / {to}": asdict(ratio(found[to], found[of])) for of, to in RATIOS},
    }


def show(console: Console, told: dict[str, Any], at_once: int) -> None:
    """The tables, and what follows for a server."""
    table = Table(
        title=f"\n{at_once} questions at once, fp32", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for column in ("", "output tokens/s", "range"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, one in told["sides"].items():
        table.add_row(name, f"{one['median']:.1f}", f"{one['min']:.1f} to {one['max']:.1f}")
    for name, one in told["ratios"].items():
        interval = "" if one["low"] is None else f"[{one['low']:.2f}, {one['high']:.2f}]"
        table.add_row(name, f"{one['median']:.2f}", escape(interval))
    console.print(table)
    share = told["ratios"]["adapter / merged"]["median"]
    verdict = "serve it merged (mem-triton serve --memo-merged)" if share < ENOUGH else "an adapter is fast enough"
    console.print(f"An adapter has {share:.2f} of the merged model's speed here: {verdict}.")


def main() -> None:
    """Entry point of ``python -m benchmarks.memo.speed``."""
    app(prog_name="python -m benchmarks.memo.speed")


if __name__ == "__main__":
    main()
