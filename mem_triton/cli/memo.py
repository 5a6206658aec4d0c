"""``mem-triton memo``: a memory model beside another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mem_triton.cli import memo_build, output

if TYPE_CHECKING:
    from mem_triton.systems.memo.protocol.settings import Settings
    from mem_triton.systems.memo.trace import Trace

app = typer.Typer(
    help="Memory models (MeMo): what they learn from, merging them, and asking with one.", no_args_is_help=True
)

app.command("build")(memo_build.build)
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
        dialect=dialect,
        executive_schema=schema,
        rules=rules,
        seed=seed,
        greedy=greedy,
        budget={name: value for name, value in budget.items() if value is not None},
    )
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


@app.command()
def merge(
    models: Annotated[list[Path], typer.Argument(metavar="MODELS...", help="Model or adapter folders.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="linear, task, ties, dare_linear, dare_ties or slerp. [ties; of one model linear]"),
    ] = None,
    base: Annotated[Optional[Path], typer.Option(help="The model that MODELS were trained from.")] = None,  # noqa: UP045
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Add adapters to --base: a whole model is written.")
    ] = False,
    weights: Annotated[str, typer.Option(help="One number a model, like 0.7,0.3. [equal]")] = "",
    density: Annotated[float, typer.Option(help="Share of each difference that ties and dare keep.")] = 0.3,
    t: Annotated[float, typer.Option(help="Of slerp: 0 is the first model, 1 the second.")] = 0.5,
    scale: Annotated[float, typer.Option(help="Of the merged difference from the base.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    rank: Annotated[Number, typer.Option(help="Of a merged adapter. [the sum of the ranks]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Merge memory models, whole ones or LoRA adapters, into a new one.

    Adapters are merged by what they add to the weights: exactly where that is a sum, else cut to a rank, and the
    residual is told. With --into-base a whole model comes of them, one adapter's, too. Whole models need --base for all
    methods but linear and slerp.
    """
    from mem_triton.systems.memo.merging.adapters import is_adapter, merge_adapters
    from mem_triton.systems.memo.merging.arithmetic import MergeError, MergeRecipe
    from mem_triton.systems.memo.merging.checkpoints import merge_checkpoints
    from mem_triton.systems.memo.merging.into_base import merge_into_base

    try:
        numbers = tuple(float(one) for one in weights.split(",")) if weights else ()
    except ValueError:
        raise MergeError(f"--weights: numbers with commas between them, got {weights!r}") from None
    method = method or ("ties" if len(models) > 1 else "linear")
    recipe = MergeRecipe(method, numbers, density, t, scale, seed)  # type: ignore[arg-type]
    kinds = {is_adapter(folder) for folder in models}
    if len(kinds) > 1:
        raise MergeError("MODELS: some are adapters and some whole models; merge the ones or the others")
    if kinds == {False} and (rank is not None or into_base):
        raise MergeError(f"{'--into-base' if into_base else '--rank'}: is of adapters, and MODELS are whole models")
    if into_base and (base is None or rank is not None):
        wrong = "--base: name the model that the adapters are of" if base is None else "--rank: a whole model has none"
        raise MergeError(wrong)
    if into_base:
        told = merge_into_base(recipe, models, base, out)
    elif kinds == {True}:
        if base is not None:
            raise MergeError("--base: is of whole models, or with --into-base the model to which adapters are added")
        told = merge_adapters(recipe, models, out, rank)
    else:
        told = merge_checkpoints(recipe, models, base, out)
    if json:
        output.print_json({"out": str(out), **told})
    else:
        output.print_fields({"merged": out, **told})


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
