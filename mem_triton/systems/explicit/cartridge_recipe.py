"""What a training run of a cartridge does (Cartridges, arXiv 2506.06266, sections 3 and 4)."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mem_triton.systems.recipes import RecipeError, make_recipe


class CartridgeRecipe(BaseModel):
    """One training run; immutable, and part of its identity.

    rows: trained keys and values of each layer; frozen: of these, the first ones that stay as they are. rate: of AdamW,
    which after a warm-up of that share of the steps falls to a tenth as a cosine. batch: lessons of a step, each a
    question with an answer. chunk_tokens: of the document that the teacher has in its context at once. asked: questions
    that the model asks itself about the document where none are given. answers: of the teacher to each question, the
    first one greedy, others sampled at ``temperature``. answer_tokens: most tokens of an answer. held_out: of so many
    questions one is kept for evaluation. dtype: of the frozen model; the rows are trained and written in float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(64, ge=1, le=65536)
    frozen: int = Field(1, ge=0)
    steps: int = Field(200, ge=1)
    batch: int = Field(8, ge=1)
    rate: float = Field(0.02, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    chunk_tokens: int = Field(1024, ge=8)
    asked: int = Field(64, ge=2)
    answers: int = Field(2, ge=1, le=64)
    answer_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.7, gt=0)
    held_out: int = Field(8, ge=2)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def recipe_of(**given: Any) -> CartridgeRecipe:
    """The recipe with some of its fields replaced; None leaves a field as it is. Raises RecipeError."""
    recipe = make_recipe(CartridgeRecipe, {name: value for name, value in given.items() if value is not None})
    if recipe.frozen >= recipe.rows:
        raise RecipeError(f"--rows: {recipe.rows} rows, of which {recipe.frozen} stay as they are: none is trained")
    return recipe
