"""The model card of a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mem_triton.systems.delta_mem.training.recipe import Recipe
from mem_triton_transformers.runs.cards import write_card


def describe(
    out: Path, recipe: Recipe, report: dict[str, Any], model: str, data: str, conversations: int, command: str
) -> Path:
    """Write the card of a run and its recipe beside the adapter. Raises OSError."""
    lines = [
        f"# A δ-mem adapter for {model}",
        "",
        f"Rank {recipe.rank}, {recipe.state_heads} state heads, corrections of {recipe.delta_heads}, layers "
        f"{recipe.layers}; {report['parameters']:,} trained parameters (arXiv 2605.12357). The model itself is as it "
        f"was. For requests: {'that name a session' if recipe.scope == 'sessions' else 'all'}.",
        "",
        "## Held-out conversations",
        "",
        "Share of sessions in which greedy decoding gives the reply exactly, with 95 % Wilson intervals: from the "
        "session's own state alone, from another session's, and from an empty one.",
        "",
        "| group | sessions | own | another session's | empty |",
        "|---|---|---|---|---|",
    ]
    for group, found in report["held_out"].items():
        if group != "plain":
            cells = [_share(found.get(name)) for name in ("own", "another", "empty")]
            lines.append(f"| {group or 'all'} | {found['own']['sessions']} | {' | '.join(cells)} |")
    if plain := report["held_out"].get("plain"):
        shown = ", ".join(f"{name} {value:.3f}" for name, value in plain["perplexity"].items())
        lines += [
            "",
            f"Perplexity of the replies of {plain['sessions']} chats that have nothing to do with it: {shown}.",
        ]
    lines += [
        "",
        "## Training",
        "",
        f"{report['steps']} steps of {recipe.batch} conversations out of {conversations} of `{Path(data).name}`, "
        f"preset {recipe.preset}, {report['seconds']:.0f} s; every step in `training.jsonl`, the loss curve in "
        "`loss.csv`, all settings in `recipe.json`.",
        "",
    ]
    return write_card(out, recipe, (model, "mem-triton", "delta-mem, memory"), lines, command)


def _share(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{100 * found['share']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
