"""The model card of a training run: ``README.md`` and ``recipe.json`` beside what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel


def write_card(
    out: Path, recipe: BaseModel, head: tuple[str, str, str], sections: Sequence[str], command: str = ""
) -> Path:
    """Write the card and the recipe into a folder, and give the card's path.

    head: the base model, the library that loads the result, and its tags. sections: lines of Markdown. command: what
    the user typed, "" if nobody did. Raises OSError.
    """
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    model, library, tags = head
    lines = ["---", f"base_model: {model}", f"library_name: {library}", f"tags: [{tags}]", "---", "", *sections]
    if command:
        lines += ["```bash", command, "```", ""]
    path = out / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
