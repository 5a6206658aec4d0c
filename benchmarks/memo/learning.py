"""What memory models learn: ``python -m benchmarks.memo.learning``.

    python -m benchmarks.memo.learning merge --save       # two corpora learned apart and merged, and learned together
    python -m benchmarks.memo.learning mix --save         # a corpus alone, and among as many facts about others
    python -m benchmarks.memo.learning capacity --save    # more and more facts in an adapter of one rank
    python -m benchmarks.memo.learning steps --save       # a build without each of its steps

Each trains adapters of SmolLM2-135M-Instruct on invented worlds and counts the held-out answers that are exactly right.
What has been trained is kept under ``.cache/memo/learned``: a command that was stopped goes on, and commands that need
the same adapter share it. Hours on a CPU; ``--facts`` and ``--epochs`` make it less.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from benchmarks.common import record
from benchmarks.common.running import demonstration
from benchmarks.common.server import BenchmarkError, choose_ports
from benchmarks.memo.corpora import EPOCHS, Row, memory_rows, row
from benchmarks.memo.learned import (
    Examiner,
    School,
    fact_rows,
    facts_of,
    parts_of,
    rows_in,
    stranger_rows,
    world_of,
)
from benchmarks.memo.world import UNKNOWN, World
from mem_triton.cli.model import ModelError, make
from mem_triton.systems.memo.merging.adapters import merge_adapters
from mem_triton.systems.memo.merging.arithmetic import METHODS, MergeRecipe
from mem_triton.systems.memo.merging.checkpoints import RECORD
from mem_triton.systems.memo.reflections.settings import STEPS

CACHE = Path(".cache")
USUAL = ("--preset", "small", "--batch", "8", "--rate", "1e-3", "--dtype", "float32")
"""Options of training, as those of the shipped memory adapter."""
STARTS = 600
"""Looks for a scripted server that starts, ten a second."""

Facts = Annotated[int, typer.Option(help="In a corpus, rounded to 14s.")]
Epochs = Annotated[int, typer.Option(min=1, help="Of each training.")]
Rank = Annotated[int, typer.Option(min=1, help="Of the adapters.")]
Seed = Annotated[int, typer.Option(help="Of world and training.")]
Save = Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@app.command()
def merge(facts: Facts = 98, epochs: Epochs = EPOCHS, rank: Rank = 16, seed: Seed = 0, save: Save = False) -> None:
    """Two corpora of --facts each: learned apart and merged by every method, against one adapter that learned both."""
    with _course("two corpora, merged against trained together", save, "memo-merge") as (report, school, examiner):
        world = world_of(2 * facts, seed)
        halves = parts_of(world, 0.5)
        options = ("--epochs", str(epochs), "--rank", str(rank), "--seed", str(seed))
        asked = {"first": fact_rows(world, halves[0]), "second": fact_rows(world, halves[1])}
        asked["unknown"] = stranger_rows(world)
        adapters = {}
        for name, taught in (("first", halves[0]), ("second", halves[1]), ("together", None)):
            adapters[name], told = school.learn(memory_rows(world, epochs, taught), *options)
            report["models"][name] = {"training": told, "asked": _examined(examiner, adapters[name], asked, name)}
        both = _facts_right(report["models"]["together"])
        for method in METHODS:
            out = school.cache / f"{adapters['first'].parent.name}-{adapters['second'].parent.name}-{method}"
            if not out.is_dir():
                merge_adapters(MergeRecipe(method), [adapters["first"], adapters["second"]], out)  # type: ignore[arg-type]
            found: dict[str, Any] = {"merge": json.loads((out / RECORD).read_text(encoding="utf-8"))}
            found["asked"] = _examined(examiner, out, asked, method)
            found["against_together"] = round(_facts_right(found) / both, 4) if both else None
            report["models"][f"merged, {method}"] = found
        report |= {"facts": facts_of(world, world.facts), "epochs": epochs, "rank": rank, "seed": seed}


@app.command()
def mix(
    facts: Facts = 98,
    share: Annotated[float, typer.Option(min=0.05, max=0.95, help="Of facts about others.")] = 0.5,
    epochs: Epochs = EPOCHS,
    rank: Rank = 16,
    seed: Seed = 0,
    save: Save = False,
) -> None:
    """A corpus learned alone, and among facts about others that make up --share of the whole."""
    with _course("a corpus alone and among unrelated facts", save, "memo-mix") as (report, school, examiner):
        world = world_of(round(facts / (1 - share)), seed)
        own, others = parts_of(world, 1 - share)
        options = ("--epochs", str(epochs), "--rank", str(rank), "--seed", str(seed))
        asked = {"own": fact_rows(world, own), "unknown": stranger_rows(world)}
        for name, taught in (("alone", own), ("mixed", None)):
            adapter, told = school.learn(memory_rows(world, epochs, taught), *options)
            report["models"][name] = {"training": told, "asked": _examined(examiner, adapter, asked, name)}
        alone, mixed = (report["models"][name]["asked"]["own"]["exact"] for name in ("alone", "mixed"))
        report |= {"facts": facts_of(world, own), "unrelated": facts_of(world, others), "rank": rank, "seed": seed}
        report |= {"epochs": epochs, "mixed_against_alone": round(mixed / alone, 4) if alone else None}


@app.command()
def capacity(
    facts: Annotated[str, typer.Option(help="Of each corpus, with commas, rounded to 14s.")] = "60,98,250",
    epochs: Epochs = EPOCHS,
    rank: Rank = 16,
    seed: Seed = 0,
    save: Save = False,
) -> None:
    """More and more facts in an adapter of one rank."""
    try:
        sizes = [int(one) for one in facts.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--facts {facts}: numbers with commas between them") from None
    with _course("facts against what an adapter holds", save, "memo-capacity") as (report, school, examiner):
        for size in sizes:
            world = world_of(size, seed)
            options = ("--epochs", str(epochs), "--rank", str(rank), "--seed", str(seed))
            adapter, told = school.learn(memory_rows(world, epochs), *options)
            asked = {"facts": fact_rows(world, world.facts), "unknown": stranger_rows(world)}
            name = f"{facts_of(world, world.facts)} facts"
            report["models"][name] = {"training": told, "asked": _examined(examiner, adapter, asked, name)}
        report |= {"epochs": epochs, "rank": rank, "seed": seed}


@app.command()
def steps(
    facts: Facts = 42,
    epochs: Epochs = EPOCHS,
    rank: Rank = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Worlds and trainings, from seed 0.")] = 3,
    save: Save = False,
) -> None:
    """A build by the scripted generator with all of its steps, and without each one in turn."""
    with _course("a build without each of its steps", save, "memo-steps") as (report, school, examiner):
        for seed in range(seeds):
            world = world_of(facts, seed)
            asked = _asked_of_builds(world)
            options = ("--epochs", str(epochs), "--rank", str(rank), "--seed", str(seed))
            with _generator(world) as spec:
                builds = {step: _built(school.cache, world, spec, step) for step in ("", *STEPS)}
            for step, rows in builds.items():
                name = f"without {step}" if step else "all steps"
                adapter, told = school.learn(rows, *options)
                found = {"training": told, "asked": _examined(examiner, adapter, asked, f"seed {seed}, {name}")}
                report["models"].setdefault(name, []).append({"seed": seed, **found})
        report |= {"facts": facts, "epochs": epochs, "rank": rank, "seeds": seeds}


@contextmanager
def _course(what: str, save: bool, name: str) -> Iterator[tuple[dict[str, Any], School, Examiner]]:
    """Give a report, a school and an examiner of the real model; the report is told, or kept, when all is in it."""
    console = Console(highlight=False)
    report = record.about(what, "python -m benchmarks.memo.learning") | {"model": "smollm2", "models": {}}
    with demonstration(console, False, ModelError, OSError, ValueError):
        make("smollm2", model := CACHE / "smollm2-float32", "float32")
        yield report, School(model, CACHE / "memo" / "learned", USUAL), Examiner(model)
        if save:
            console.print(f"kept in {record.save(report, name).relative_to(record.ROOT)}")


def _examined(examiner: Examiner, adapter: Path, asked: dict[str, list[Row]], name: str) -> dict[str, Any]:
    """What an adapter answers of each kind; it is said at once, for a course takes hours."""
    found = {kind: examiner.exact(adapter, rows) for kind, rows in asked.items()}
    said = ", ".join(f"{kind} {one['exact']} of {one['rows']}" for kind, one in found.items())
    print(f"{name}: {said}", flush=True)
    return found


def _facts_right(model: dict[str, Any]) -> int:
    return sum(model["asked"][half]["exact"] for half in ("first", "second"))


def _asked_of_builds(world: World) -> dict[str, list[Row]]:
    """Facts in the wording that no step writes into training, entities by what they are, and names nobody knows."""
    facts = [row(one.question, one.answer) for one in world.one_hop(slice(3, 4))]
    entities = [row(one.question, one.answer) for one in world.surfacing()]
    unknown = [row(one.question, UNKNOWN) for one in world.unknown()]
    return {"facts": facts, "entities": entities, "unknown": unknown}


@contextmanager
def _generator(world: World) -> Iterator[str]:
    """A scripted generator in a process of its own, as URL#MODEL."""
    (port,) = choose_ports(None, 1)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.memo.scripted", "--port", str(port)])
    try:
        for _ in range(STARTS):
            try:
                httpx.get(f"http://127.0.0.1:{port}/log", timeout=5)
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    break
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1#generator"
    finally:
        process.kill()
        process.wait()


def _built(cache: Path, world: World, spec: str, step: str) -> list[Row]:
    """The training rows of a build of the world's documents. step: the one that is left out, "" for none."""
    folder = cache / f"build-{world.seed}-{len(world.facts)}-{step or 'all'}"
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for name, text in world.documents().items():
        (texts / f"{name}.md").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mem_triton.cli", "memo", "build", str(texts), str(folder / "out"), "--quiet"]
    command += ["--generator", spec, "--max-tokens", "4000", *(["--skip", step] if step else [])]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise BenchmarkError(f"the build in {folder} failed, see above; the same command goes on")
    return rows_in(folder / "out" / "train.jsonl")


def main() -> None:
    """Entry point of ``python -m benchmarks.memo.learning``."""
    app(prog_name="python -m benchmarks.memo.learning")


if __name__ == "__main__":
    main()
