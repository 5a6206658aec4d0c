"""``mem-triton train memo``: a memory model, from questions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mem_triton.cli import output, training

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045


def memo(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of `memo build`, or JSONL of its rows.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's or model's folder.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of the model that learns.")],
    method: Annotated[Text, typer.Option(help='"lora", an adapter, or "full", all weights. [lora]')] = None,
    preset: Annotated[str, typer.Option(help='"paper" (arXiv 2605.15156) or "small".')] = "paper",
    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Rows to evaluate on after each epoch. [eval.jsonl of the folder]"),
    ] = None,
    mix: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Older rows that are trained on as well; may be given again."),
    ] = None,
    epochs: Annotated[Int, typer.Option(help="How often all rows are seen, at most.")] = None,
    patience: Annotated[Int, typer.Option(help="Epochs without a better one, then the run ends; 0: never.")] = None,
    batch: Annotated[Int, typer.Option(help="Rows of a step.")] = None,
    rows: Annotated[Int, typer.Option(help="Rows of a forward call; fewer take less memory.")] = None,
    rate: Annotated[Float, typer.Option(help="Learning rate of AdamW.")] = None,
    schedule: Annotated[Text, typer.Option(help='After the warm-up: "cosine" or "constant".')] = None,
    rank: Annotated[Int, typer.Option(help="Of the adapter.")] = None,
    alpha: Annotated[Float, typer.Option(help="Of the adapter: its scale is alpha / rank.")] = None,
    most_tokens: Annotated[Int, typer.Option(help="Longest row.")] = None,
    seed: Annotated[Int, typer.Option(help="Of the first weights and of the order of rows.")] = None,
    dtype: Annotated[Text, typer.Option(help="Precision of the model that learns.")] = None,
    weights: Annotated[Text, typer.Option(help="Precision of what is written.")] = None,
    device: Annotated[Text, typer.Option(help='"cuda", "cpu". [the GPU if there is one]')] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints; each epoch has one, too.")] = 50,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a memory model (MeMo) on questions and answers; the loss is on the answers alone.

    What is trained is what the protocol asks: the chat template with the bare question. The same command goes on with
    a run that was stopped or killed. What it writes into OUT: the adapter or the model, a model card, the log with the
    evaluations, the loss curve.
    """
    from mem_triton.cli.settings import check_encoding, folder_of
    from mem_triton.systems.memo.training.recipe import recipe_of

    given: dict[str, Any] = {
        "method": method,
        "epochs": epochs,
        "patience": patience,
        "batch": batch,
        "rows": rows,
        "rate": rate,
        "schedule": schedule,
        "rank": rank,
        "alpha": alpha,
        "most_tokens": most_tokens,
        "seed": seed,
        "dtype": dtype,
        "weights": weights,
    }
    recipe = recipe_of(preset, **given)
    check_encoding(recipe.dtype, device)
    folder = folder_of(model)
    module = training.integration("memo_training.run", "trl and peft", "train")
    report = training.run(
        module.train,
        out,
        training.TrainingLines(quiet or json, _evaluation, _step),
        folder=folder,
        data=data,
        preset=preset,
        held_out=held_out,
        mix=mix or (),
        name=model,
        device=device,
        save_every=save_every,
        **given,
    )
    if json:
        return output.print_json(report)
    print(output.plain(f"{out}: {report['steps']} steps, {report['epochs']} epochs, {report['cpu_seconds']:.0f} CPU s"))
    if report["held_out"]["exact"] is not None:
        found = report["held_out"]
        print(f"held out: {100 * found['exact']:.1f} % of {found['rows']} exact, epoch {found['epoch']}")


def _evaluation(line: Mapping[str, Any]) -> str | None:
    if "exact" not in line:
        return None
    shown = f"{100 * line['exact']:.1f} % of {line['held_out']} exact, loss {line['held_out_loss']:.4f}"
    return f"epoch {line['epoch']}, held out: {shown}, {line['cpu_seconds']:.0f} CPU s"


def _step(line: Mapping[str, Any]) -> str:
    return f"step {line['step']}, epoch {line['epoch']}, loss {line['loss']:.3f}, {line['seconds']:.0f} s"
