"""``mem-triton train cartridge``: few keys and values for a document, distilled from the model that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mem_triton.cli import output, training

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045
File = Optional[Path]  # noqa: UP045


def cartridge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.", show_default=False)],
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="A text or Markdown file.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder.", show_default=False)],
    rows: Annotated[Int, typer.Option(min=1, help="Trained keys and values of each layer. [64]")] = None,
    questions: Annotated[
        File, typer.Option(help="JSONL of questions, with or without answers. [the model asks itself]")
    ] = None,
    held_out: Annotated[File, typer.Option(help="Questions to evaluate on. [every 8th of all]")] = None,
    steps: Annotated[Int, typer.Option(min=1, help="Steps of the optimizer. [200]")] = None,
    batch: Annotated[Int, typer.Option(min=1, help="Answers of a step. [8]")] = None,
    rate: Annotated[Float, typer.Option(help="Learning rate of AdamW. [0.02]")] = None,
    chunk_tokens: Annotated[Int, typer.Option(help="Tokens of the document in the context at once. [1024]")] = None,
    asked: Annotated[Int, typer.Option(help="Questions that the model asks itself. [64]")] = None,
    answers: Annotated[Int, typer.Option(min=1, help="The model's answers to a question. [2]")] = None,
    answer_tokens: Annotated[Int, typer.Option(min=1, help="Longest answer. [48]")] = None,
    seed: Annotated[Int, typer.Option(help="Of questions, answers and the order of lessons. [0]")] = None,
    dtype: Annotated[Text, typer.Option(help="Precision of the frozen model.")] = None,
    device: Annotated[Text, typer.Option(help='"cuda", "cpu". [the GPU if there is one]')] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 25,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a cartridge: a few rows of keys and values answer as the model does with the document in its context.

    The model is frozen. It asks itself questions about the document, answers them with the text before it, and the rows
    learn to give the same answers without the text. The same command goes on with a run that was stopped or killed.
    OUT gets an adapter of peft, which `mem-triton import` puts into a bank, a model card, the log and the loss curve.
    """
    from mem_triton.cli.settings import check_encoding, folder_of
    from mem_triton.systems.explicit.cartridge_recipe import recipe_of
    from mem_triton.write.chunking import read_documents

    recipe = recipe_of(
        rows=rows,
        steps=steps,
        batch=batch,
        rate=rate,
        chunk_tokens=chunk_tokens,
        asked=asked,
        answers=answers,
        answer_tokens=answer_tokens,
        seed=seed,
        dtype=dtype,
    )
    check_encoding(recipe.dtype, device)
    folder, text = folder_of(model), next(read_documents(document, format="text"))
    module = training.integration("cartridge_training.run", "transformers and a peft that has cartridges", "train")
    report = training.run(
        module.train,
        out,
        training.TrainingLines(quiet or json, _evaluation, _step),
        folder=folder,
        document=text,
        recipe=recipe,
        questions=questions,
        held_out=held_out,
        name=model,
        device=device,
        save_every=save_every,
        evaluate_every=evaluate_every,
    )
    if json:
        return output.print_json(report)
    print(output.plain(f"{out}: {report['rows']} rows for {report['document_tokens']} tokens, {report['steps']} steps"))
    shown = ", ".join(f"{way} {value:.3f}" for way, value in report["divergence"].items())
    print(output.plain(f"divergence from the model with the text, held out: {shown}"))
    if recall := report["recall"]:
        shown = ", ".join(f"{way} {found['right']}" for way, found in recall.items() if way != "questions")
        print(output.plain(f"held-out answers, right of {recall['questions']}: {shown}"))


def _evaluation(line: Mapping[str, Any]) -> str | None:
    return f"step {line['step']}, held out: divergence {line['held_out']:.3f}" if "held_out" in line else None


def _step(line: Mapping[str, Any]) -> str:
    return f"step {line['step']}, loss {line['loss']:.3f}, {line['seconds']:.0f} s"
