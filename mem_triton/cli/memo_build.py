"""``mem-triton memo build``: questions and answers about documents, from which a memory model learns them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.systems.memo.reflections.ledger import Ledger
    from mem_triton.systems.memo.reflections.pipeline import BuildProgress
    from mem_triton.systems.memo.reflections.settings import BuildSettings

Number = Optional[int]  # noqa: UP045  typer reads annotations on Python 3.10
Real = Optional[float]  # noqa: UP045
LEDGER, LOCK = "ledger.sqlite", "build.lock"


def build(
    paths: Annotated[list[Path], typer.Argument(metavar="[SOURCES]... OUT", help="Texts, folders; last the result.")],
    generator: Annotated[Optional[str], typer.Option(help="The model that writes, as URL#MODEL.")] = None,  # noqa: UP045
    skip: Annotated[Optional[list[str]], typer.Option(help="A step to leave out; may be repeated.")] = None,  # noqa: UP045
    requests: Annotated[Number, typer.Option(min=1, help="Most requests, of all runs together.")] = None,
    tokens: Annotated[Number, typer.Option(min=1, help="Most tokens, of all runs together.")] = None,
    cost: Annotated[Real, typer.Option(help="Highest cost, in the unit of --price.")] = None,
    price: Annotated[str, typer.Option(help="Of a million prompt and completion tokens, like 0.2,0.6.")] = "0,0",
    paraphrases: Annotated[Number, typer.Option(min=1, help="Wordings of a question, the last held out. [3]")] = None,
    unknowns: Annotated[Number, typer.Option(min=1, help="Questions a text about invented names. [4]")] = None,
    chunk_words: Annotated[Number, typer.Option(min=50, help="Words of a part of a text. [6400]")] = None,
    overlap_words: Annotated[Number, typer.Option(min=0, help="Words that parts share. [640]")] = None,
    max_tokens: Annotated[Number, typer.Option(min=64, help="Of a reply. [32768]")] = None,
    temperature: Annotated[Real, typer.Option(help="Of the generator. [1.1]")] = None,
    at_once: Annotated[Number, typer.Option(min=1, help="Requests that run together. [32]")] = None,
    call_seconds: Annotated[Real, typer.Option(help="Longest time of a request. [300]")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what the generator could not do.")] = False,
    remove: Annotated[Optional[list[str]], typer.Option(help="A source or id to forget; may be repeated.")] = None,  # noqa: UP045
    jsonl_field: Annotated[str, typer.Option(help="JSONL field of the text.")] = "text",
    jsonl_id_field: Annotated[Optional[str], typer.Option(help="JSONL field of the id.")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Let a model write questions and answers about texts, and put them into the folder OUT.

    What is there already is left alone: the same command goes on after a kill, a generator that went down, or a budget
    that ran out, and takes new texts in. OUT gets train.jsonl and eval.jsonl (prompt and completion), pairs.jsonl
    (where each pair comes from), cache.json (the authors' format) and the ledger. Exit code 1 says that something is
    missing, with the reason.
    """
    from mem_triton.store.files import WriterLock

    *sources, out = paths
    settings = _settings(
        price,
        requests=requests,
        tokens=tokens,
        cost=cost,
        skip=tuple(skip or ()),
        paraphrases=paraphrases,
        unknowns=unknowns,
        chunk_words=chunk_words,
        overlap_words=overlap_words,
        max_tokens=max_tokens,
        temperature=temperature,
        at_once=at_once,
        call_seconds=call_seconds,
    )
    if sources and generator is None:
        raise ValueError("--generator: name the model that writes, as URL#MODEL")
    if not sources and not remove and generator is None:
        raise ValueError("SOURCES: name texts, or --generator to go on with those that are there")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"OUT: there is no folder {out.absolute().parent}")
    out.mkdir(exist_ok=True)
    lock = WriterLock(out / LOCK)
    try:
        _build(sources, out, generator, settings, retry, remove or [], (jsonl_field, jsonl_id_field), quiet, json)
    finally:
        lock.release()


def _settings(price: str, *, requests: Any, tokens: Any, cost: Any, **told: Any) -> BuildSettings:
    from pydantic import ValidationError

    from mem_triton.systems.memo.reflections.settings import BuildBudget, BuildSettings

    try:
        prompt, completion = map(float, price.split(","))
    except ValueError:
        raise ValueError(f"--price: two numbers with a comma between them, got {price!r}") from None
    try:
        budget = BuildBudget(
            requests=requests, tokens=tokens, cost=cost, prompt_price=prompt, completion_price=completion
        )
        return BuildSettings(budget=budget, **{name: value for name, value in told.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


def _build(
    sources: list[Path],
    out: Path,
    generator: str | None,
    settings: BuildSettings,
    retry: bool,
    remove: list[str],
    fields: tuple[str, str | None],
    quiet: bool,
    json: bool,
) -> None:
    import asyncio

    from mem_triton.systems.memo.reflections.ledger import Ledger
    from mem_triton.systems.memo.reflections.pipeline import cost_of, export

    problems: list[str] = []
    ledger = Ledger(out / LEDGER)
    try:
        for name in remove:
            if not ledger.remove(name):
                raise ValueError(f"--remove: there is no source and no document {name!r}")
        if sources:
            _take_in(ledger, sources, fields, problems)
        if retry:
            ledger.reopen()
        stopped = asyncio.run(_run(ledger, generator, settings, quiet or json)) if generator is not None else ""
        rows = export(ledger, out, settings)
        failed = ledger.reasons()
        report = {"steps": ledger.report(), **rows, "cost": cost_of(settings, ledger.cost())}
    finally:
        ledger.close()
    problems += [f"failed: {reason}" for reason in failed] + ([f"stopped: {stopped}"] if stopped else [])
    if not rows["pairs.jsonl"] and not stopped and not remove:
        problems.append("the texts gave no pair: there are no facts in them, or the generator found none")
    if json:
        output.print_json({**report, "problems": problems})
    else:
        _print(report, out)
    for problem in problems:
        output.note(problem)
    if problems:
        raise typer.Exit(1)


def _take_in(ledger: Ledger, sources: list[Path], fields: tuple[str, str | None], problems: list[str]) -> None:
    from mem_triton.cli.sources import SUFFIXES, SourceDocuments, sources_of
    from mem_triton.systems.memo.reflections.ledger import SourceText
    from mem_triton.write.chunking import unusable

    found = sources_of(sources)
    if not found:
        raise ValueError(f"SOURCES: no {', '.join(SUFFIXES)} among {', '.join(map(str, sources))}")
    documents = SourceDocuments(found, format=None, field=fields[0], id_field=fields[1], id=None, single=True)
    texts: dict[str, SourceText] = {}
    for document in documents:
        if (reason := unusable(document)) is not None:
            problems.append(f"{document.source}: {reason}")
            continue
        id, number = document.name, 1
        while id in texts:
            number += 1
            id = f"{document.name}.{number}"
        texts[id] = SourceText(id, document.source, document.text)
    problems += documents.problems
    ledger.add_documents(texts.values())


async def _run(ledger: Ledger, generator: str, settings: BuildSettings, quiet: bool) -> str:
    from mem_triton.systems.memo.endpoint import Endpoint
    from mem_triton.systems.memo.reflections.pipeline import Build

    async with Endpoint(generator, at_once=2 * settings.at_once) as model:
        await model.check(structured=True)
        with Bar(quiet) as bar:
            return await Build(ledger, model, settings, bar).run()


class Bar:
    """A bar on a terminal, elsewhere a line a step."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.quiet, self.terminal, self.step = quiet, sys.stderr.isatty(), ""
        self.bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=output.console(stderr=True),
            disable=quiet or not self.terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, speed="-")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def __call__(self, progress: BuildProgress) -> None:
        if progress.step != self.step:
            self.step = progress.step
            self.bar.reset(self.task, total=progress.units, description=progress.step)
        speed = f"{progress.cost.completion_tokens / max(progress.seconds, 1e-3):.0f}"
        self.bar.update(self.task, completed=progress.done, speed=speed)
        if not self.quiet and not self.terminal and progress.done == progress.units:
            output.note(f"{progress.step}: {progress.units} units, {speed} tokens/s")


def _print(report: dict[str, Any], out: Path) -> None:
    columns = ("step", "units", "failed", "open", "requests", "prompt_tokens", "completion_tokens", "pairs")
    output.print_table(
        [name.replace("_", " ") for name in columns], [[row[name] for name in columns] for row in report["steps"]]
    )
    told = {name: report[name] for name in ("train.jsonl", "eval.jsonl", "duplicates")}
    output.print_fields({"out": out, **told, **({"cost": f"{report['cost']:.2f}"} if report["cost"] else {})})
