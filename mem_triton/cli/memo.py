"""``mem-triton memo``: a memory model beside another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import output

if TYPE_CHECKING:
    from mem_triton.systems.memo.protocol.settings import Settings
    from mem_triton.systems.memo.trace import Trace

app = typer.Typer(help="Ask a model that has a memory model beside it (MeMo).", no_args_is_help=True)

Number = Optional[int]  # noqa: UP045  typer reads annotations on Python 3.10


@app.command()
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In words.", show_default=False)],
    executive: Annotated[str, typer.Option(help="The model that asks and answers, as URL#MODEL.")],
    memory: Annotated[str, typer.Option(help="The model that has learned the documents, as URL#MODEL.")],
    trace: Annotated[Optional[Path], typer.Option(help="Write what happened to this file.")] = None,  # noqa: UP045
    dialect: Annotated[
        str, typer.Option(help='"plain": bare questions; "paper": with the paper\'s wrapper.')
    ] = "plain",
    schema: Annotated[str, typer.Option(help='"paper": four stages; "compact": for a small executive.')] = "paper",
    rules: Annotated[str, typer.Option(help='"strict", or "paper": count ignorance as the authors\' code.')] = "strict",
    greedy: Annotated[bool, typer.Option("--greedy", help="No sampling.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time of the whole run.")] = 180.0,
    memory_calls: Annotated[Number, typer.Option(min=1, help="Most requests to the memory model. [200]")] = None,
    executive_calls: Annotated[Number, typer.Option(min=1, help="Most requests to the executive. [40]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Ask a question of two models behind OpenAI-compatible servers, which need to know nothing of mem_triton.

    The executive asks the memory model short questions and answers from its replies. OPENAI_API_KEY is the servers'
    key. Exit code 1 says that the run ended with an error, such as a memory model that is down; a trace is written
    then, too.
    """
    import asyncio

    budget = {"seconds": seconds, "memory_calls": memory_calls, "executive_calls": executive_calls}
    settings = _settings(
        dialect=dialect, executive_schema=schema, rules=rules, seed=seed, greedy=greedy,
        budget={name: value for name, value in budget.items() if value is not None},
    )  # fmt: skip
    if trace is not None and not trace.parent.is_dir():
        raise ValueError(f"--trace: there is no folder {trace.parent}")
    made = asyncio.run(_ask(question, settings, executive, memory, quiet or json))
    if trace is not None:
        made.write(trace)
    _print(made, json)
    if made.result.kind == "error":
        raise typer.Exit(1)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A file of `ask --trace`.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the protocol again on a trace's replies, without any model, and check that the file comes out the same."""
    from mem_triton.systems.memo.trace import read

    made = read(trace)
    if not json:
        from mem_triton.cli.memo_live import Lines

        lines = Lines()
        for step in made.steps():
            lines(*step)
    _print(made, json)


def _settings(*, greedy: bool, **told: Any) -> Settings:
    from pydantic import ValidationError

    from mem_triton.systems.memo.protocol.settings import GREEDY, Settings

    try:
        return Settings(**told, **({"temperatures": GREEDY} if greedy else {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else "budget"
        option = {"executive_schema": "schema"}.get(name, name).replace("_", "-")
        raise ValueError(f"--{option}: {first['msg'].removeprefix('Value error, ')}") from None


async def _ask(question: str, settings: Settings, executive: str, memory: str, quiet: bool) -> Trace:
    from mem_triton.cli.memo_live import Lines
    from mem_triton.systems.memo.driver import run
    from mem_triton.systems.memo.endpoint import Endpoint

    async with Endpoint(executive) as first, Endpoint(memory) as second:
        await first.check(structured=True)
        await second.check()
        watch = Lines() if not quiet else lambda *step: None
        try:
            return await run(question, settings, {"executive": first, "memory": second}, watch)
        finally:
            if isinstance(watch, Lines):
                watch.close()


def _print(trace: Trace, json: bool) -> None:
    from dataclasses import asdict

    final, result = trace.final, trace.result
    if json:
        replies = [asdict(item) | {"used": item.number in result.evidence} for item in final.evidence]
        output.print_json({"result": asdict(result), "replies": replies, "spent": asdict(final.spent)})
        return
    if result.kind == "error":
        output.note(f"error: {result.text}")
        return
    print(output.plain(result.text))
    for item in final.evidence:
        if item.number in result.evidence:
            output.note(f"from {item.number}: {item.question} {item.text}")
    spent = final.spent
    tokens = spent.prompt_tokens + spent.completion_tokens
    ended = f"; ended by {', '.join(result.ended_by)}" if result.ended_by else ""
    output.note(
        f"{spent.executive_calls} executive and {spent.memory_calls} memory calls, {tokens} tokens, "
        f"{spent.seconds:.1f} s{ended}"
    )
