"""The model card of a trained memory model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mem_triton.systems.memo.training.recipe import MemoRecipe
from mem_triton_transformers.runs.cards import write_card


def describe(
    out: Path,
    recipe: MemoRecipe,
    report: dict[str, Any],
    model: str,
    data: Path,
    mix: Sequence[Path],
    evaluations: Sequence[dict[str, Any]],
    command: str,
) -> Path:
    """Write the card of a run and its recipe into the folder. Raises OSError."""
    kind = f"LoRA of rank {recipe.rank} on all linear layers" if recipe.method == "lora" else "All weights trained"
    lines = [
        f"# A memory model from {model}",
        "",
        f"{kind}; {report['parameters']:,} trained parameters (MeMo, arXiv 2605.15156).",
        "",
    ]
    if evaluations:
        lines += [
            "## Held-out questions",
            "",
            f"Share of {report['held_out']['rows']} answers that greedy decoding gives exactly; the best is kept.",
            "",
            "| epoch | exact | loss | CPU seconds |",
            "|---|---|---|---|",
        ]
        for one in evaluations:
            figures = f"{100 * one['exact']:.1f} % | {one['held_out_loss']:.4f} | {one['cpu_seconds']:.0f}"
            lines.append(f"| {one['epoch']} | {figures} |")
        lines.append("")
    sources = ", ".join(f"`{path.name}`" for path in (data, *mix))
    lines += [
        "## Training",
        "",
        f"{report['rows']} rows of {sources}, sha256 of rows and held-out rows `{report['digest']}`. "
        f"{report['epochs']} epochs, {report['steps']} steps of about {recipe.batch} rows, "
        f"{report['tokens']:,} tokens, preset "
        f"{recipe.preset}, {report['seconds']:.0f} s, {report['cpu_seconds']:.0f} CPU s. Every step is in "
        "`training.jsonl`, the loss curve in `loss.csv`, all settings in `recipe.json`.",
        "",
    ]
    return write_card(
        out, recipe, (model, "peft" if recipe.method == "lora" else "transformers", "memo, memory"), lines, command
    )
