"""``mem-triton train delta``: a δ-mem adapter for a frozen model, from conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mem_triton.cli import output, training

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045


def delta(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.", show_default=False)],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Chat JSONL, a folder of it or of datasets.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder.", show_default=False)],
    preset: Annotated[str, typer.Option(help='"paper" (arXiv 2605.12357) or "small".')] = "paper",
    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Conversations to evaluate on. [every 20th of DATA]"),
    ] = None,
    steps: Annotated[Int, typer.Option(min=1, help="Steps of the optimizer; may change when a run goes on.")] = None,
    epochs: Annotated[Float, typer.Option(help="Instead of --steps: how often DATA is seen.")] = None,
    batch: Annotated[Int, typer.Option(min=1, help="Conversations of a step.")] = None,
    rows: Annotated[Int, typer.Option(min=1, help="Conversations of a forward.")] = None,
    rate: Annotated[Float, typer.Option(help="Learning rate of AdamW.")] = None,
    rank: Annotated[Int, typer.Option(help="Rank of a state.")] = None,
    state_heads: Annotated[Int, typer.Option(help="States of a layer.")] = None,
    delta_heads: Annotated[Text, typer.Option(help='Projections that are corrected, such as "q,o".')] = None,
    layers: Annotated[Text, typer.Option(help='"all", "middle", or like "10-17".')] = None,
    beta_bias: Annotated[Float, typer.Option(help="Where write gates begin, before the sigmoid.")] = None,
    start: Annotated[Text, typer.Option(help='"fresh", or "closed_form": from the model\'s activations.')] = None,
    state_only: Annotated[Float, typer.Option(help="Share of batches answered from the state alone.")] = None,
    plain_share: Annotated[Float, typer.Option(help="Share of batches of chats that tell nothing.")] = None,
    keep: Annotated[Float, typer.Option(help="Weight of what must stay as the frozen model has it.")] = None,
    asked_tokens: Annotated[Int, typer.Option(help="Longest request that asks.")] = None,
    told_tokens: Annotated[Int, typer.Option(help="Most tokens that are told.")] = None,
    reply_tokens: Annotated[Int, typer.Option(help="Longest reply of the model's own.")] = None,
    chunk_tokens: Annotated[Int, typer.Option(help="Tokens of a forward; less takes less memory.")] = None,
    scope: Annotated[Text, typer.Option(help='Requests it is for: "all", or "sessions".')] = None,
    seed: Annotated[Int, typer.Option(help="Of the first weights and of the order of DATA.")] = None,
    dtype: Annotated[Text, typer.Option(help="Precision of the frozen model.")] = None,
    weights: Annotated[Text, typer.Option(help="Precision of the adapter that is written.")] = None,
    device: Annotated[Text, typer.Option(help='"cuda", "cpu". [the GPU if there is one]')] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 25,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a δ-mem adapter: the model is frozen, its memory learns to hold what conversations tell.

    The same command goes on with a run that was stopped or killed, with the same result. What it writes into OUT: the
    adapter, a model card, the log with the evaluations, the loss curve.
    """
    from mem_triton.cli.settings import check_encoding, folder_of
    from mem_triton.systems.delta_mem.training.recipe import recipe_of

    recipe = recipe_of(
        preset,
        steps=steps,
        epochs=epochs,
        batch=batch,
        rows=rows,
        rate=rate,
        rank=rank,
        state_heads=state_heads,
        delta_heads=delta_heads,
        layers=layers,
        beta_bias=beta_bias,
        start=start,
        state_only=state_only,
        plain_share=plain_share,
        keep=keep,
        asked_tokens=asked_tokens,
        told_tokens=told_tokens,
        reply_tokens=reply_tokens,
        weights=weights,
        chunk_tokens=chunk_tokens,
        scope=scope,
        seed=seed,
        dtype=dtype,
    )
    check_encoding(recipe.dtype, device)
    folder = folder_of(model)
    module = training.integration("delta_training.run", "transformers", "hf")
    shown = training.integration("delta_training.evaluate", "transformers", "hf").one_line
    report = training.run(
        module.train,
        out,
        training.TrainingLines(quiet or json, partial(_evaluation, shown), _step),
        folder=folder,
        data=data,
        recipe=recipe,
        held_out=held_out,
        name=model,
        device=device,
        save_every=save_every,
        evaluate_every=evaluate_every,
    )
    if json:
        return output.print_json(report)
    print(output.plain(f"{out}: adapter {report['fingerprint'][:16]}, {report['steps']} steps"))
    if report["held_out"]:
        print(output.plain(f"own / another's / empty memory: {shown(report['held_out'])}"))


def _evaluation(shown: Callable[[Any], str], line: Mapping[str, Any]) -> str | None:
    if "held_out" not in line:
        return None
    return f"step {line['step']}, own / another's / empty memory: {shown(line['held_out'])}"


def _step(line: Mapping[str, Any]) -> str:
    parts = [f"step {line['step']}", f"stage {line['stage']}", f"loss {line['loss']:.3f}"]
    parts += [f"recalled {line['recalled_loss']:.3f}"] if line["recalled_loss"] is not None else []
    return ", ".join([*parts, f"exact {100 * line['right']:.0f} %", f"{line['seconds']:.0f} s"])
