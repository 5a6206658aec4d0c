"""The model card of a trained cartridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mem_triton.systems.explicit.cartridge_recipe import CartridgeRecipe
from mem_triton_transformers.runs.cards import write_card


def describe(
    out: Path, recipe: CartridgeRecipe, report: dict[str, Any], model: str, document: str, command: str
) -> Path:
    """Write the card of a run and its recipe beside the adapter. Raises OSError."""
    lines = [
        f"# A cartridge of `{Path(document).name}` for {model}",
        "",
        f"{recipe.rows} rows of keys and values in each layer stand for {report['document_tokens']} tokens "
        f"(Cartridges, arXiv 2506.06266); {report['numbers']:,} trained numbers. `mem-triton import` reads it.",
        "",
        f"## {report['held_out']} held-out questions",
        "",
        "KL divergence a token from the model that has the text in its context, in nats"
        + (
            ", and share of greedy replies that say the answer, with 95 % Wilson intervals."
            if report["recall"]
            else "."
        ),
        "",
        "| before the question | divergence | says the answer |",
        "|---|---|---|",
    ]
    for way in ("text in the context", "cartridge", "first rows", "nothing"):
        divergence = "0" if way == "text in the context" else f"{report['divergence'][way]:.3f}"
        lines.append(f"| {way} | {divergence} | {_share(report['recall'], way)} |")
    lines += [
        "",
        '"First rows": the keys and values of the document\'s first tokens, with which the training began.',
        "",
        "## Training",
        "",
        f"{report['steps']} steps of {recipe.batch} out of {report['lessons']} lessons, {report['seconds']:.0f} s, "
        f"{report['cpu_seconds']:.0f} CPU s. sha256 of document and questions `{report['digest']}`. Every step is in "
        "`training.jsonl`, the loss curve in `loss.csv`, all settings in `recipe.json`.",
        "",
    ]
    return write_card(out, recipe, (model, "peft", "cartridge, memory"), lines, command)


def _share(recall: dict[str, Any] | None, way: str) -> str:
    if recall is None:
        return "–"
    low, high = recall[way]["interval"]
    share = 100 * recall[way]["right"] / recall["questions"]
    return f"{share:.0f} % of {recall['questions']} ({100 * low:.0f}–{100 * high:.0f})"
