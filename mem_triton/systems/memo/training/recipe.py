"""What a training run of a memory model does.

``paper`` holds the numbers of arXiv 2605.15156 and of its authors' scripts, those for LoRA with ``--method lora``;
``small`` is for models of some hundred million parameters and some hundred facts on a CPU.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mem_triton.systems.recipes import RecipeError, make_recipe


class MemoRecipe(BaseModel):
    """One training run; immutable, and part of its identity.

    method: "lora", an adapter on all linear layers, or "full", all weights. rate: of AdamW. schedule: after the
    warm-up, which takes that share of the steps. batch: rows of a step; rows: of one forward call. epochs: at most;
    patience: epochs without a rise of the exact held-out answers after which the run ends, 0 for never; the best epoch
    is kept. most_tokens: of a row. dtype: of the base model; weights: of what is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "paper"
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    rate: float = Field(2e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "constant"
    epochs: int = Field(3, ge=1, le=1000)
    patience: int = Field(0, ge=0)
    batch: int = Field(512, ge=1)
    rows: int = Field(16, ge=1)
    most_tokens: int = Field(8096, ge=8)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = Field(0, ge=0, lt=2**32)

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of ``steps``, as a share of ``rate``; cosine ends at a twentieth of it."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        done = (step - warm) / max(1, steps - warm)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


SMALL_MODEL = 2_000_000_000
"""Parameters below which the authors' LoRA has rank 8 and alpha 16."""
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "rate": 1.5e-3,
        "beta2": 0.99,
        "schedule": "cosine",
        "epochs": 12,
        "patience": 4,
        "batch": 16,
        "most_tokens": 1024,
    },
}


def recipe_of(preset: str, parameters: int = SMALL_MODEL, **given: Any) -> MemoRecipe:
    """A preset with some of its fields replaced; None leaves a field as it is. parameters: of the model.

    Raises RecipeError naming the option.
    """
    if preset not in PRESETS:
        raise RecipeError(f"--preset: {preset!r:.80} is none of {', '.join(PRESETS)}")
    chosen: dict[str, Any] = {"preset": preset, **PRESETS[preset]}
    if preset == "paper" and given.get("method") == "full":
        chosen["rate"] = 2e-5
    elif preset == "paper" and parameters < SMALL_MODEL:
        chosen |= {"rank": 8, "alpha": 16.0}
    return make_recipe(MemoRecipe, chosen | {name: value for name, value in given.items() if value is not None})
