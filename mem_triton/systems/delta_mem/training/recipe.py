"""What a training run does: the shape of the adapter, the optimizer, the mix of batches and the losses.

``paper`` holds the numbers of arXiv 2605.12357 and of its official training script; ``small`` is for models of some
hundred million parameters and a few hundred steps on a CPU.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mem_triton.systems.delta_mem.config import DeltaMemConfig
from mem_triton.systems.recipes import RecipeError, make_recipe, refused


class Recipe(BaseModel):
    """One training run; immutable, and part of each checkpoint.

    layers: "all", "middle" (from a third to three fifths of the depth), or "10-17" or "3,5". rate: of AdamW.
    schedule: after the warm-up, "cosine" to 0, "constant", or "late": constant, and to 0 over the last fifth.
    state_only: share of batches that are answered from the state alone; in others what was told stands in the prompt
    too. plain_share: batches of chats that tell nothing. keep: weight of the KL divergence from the frozen model on
    these, half of them after another session's told requests, and on replies to what is told (``keep_replies``: share
    of batches). recalled_weight: of tokens that only the memory can know, beside the mean over the whole reply.
    contrast, causal: weights of softplus((margin - gap) / margin), gap being the loss with an empty or another
    session's memory minus the loss with one's own; anchor: the same for the loss minus that of the frozen model that
    has all in its context; kl: divergence from that model. sparsity: weight of the mean write gate above
    sparsity_target. advance: share of exact replies at which the next stage begins. reply_tokens: most tokens of the
    model's own replies. chunk_tokens: tokens of one forward call; a longer conversation is walked in chunks that are
    computed again in the backward pass. dtype: of the frozen model. weights: of the finished adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "paper"
    rank: int = Field(8, ge=1, le=64)
    alpha: float = Field(16.0, gt=0)
    state_heads: int = Field(1, ge=1, le=64)
    delta_heads: str = "q,o"
    layers: str = "all"
    output_init: Literal["zero", "random", "base_slice", "base_slice_fixed"] = "base_slice_fixed"
    online_gain: float = Field(0.05, gt=0)
    beta_bias: float = -1.5
    granularity: Literal["token"] = "token"
    start: Literal["fresh", "closed_form"] = "fresh"
    scope: Literal["all", "sessions"] = "all"

    rate: float = Field(2e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["cosine", "constant", "late"] = "cosine"
    steps: int = Field(0, ge=0)
    epochs: float = Field(1.0, gt=0)
    batch: int = Field(32, ge=1)
    rows: int = Field(4, ge=1)

    state_only: float = Field(0.2, ge=0, le=1)
    plain_share: float = Field(0.0, ge=0, le=1)
    keep: float = Field(0.0, ge=0)
    keep_replies: float = Field(0.0, ge=0, le=1)
    recalled_weight: float = Field(0.0, ge=0)
    contrast: float = Field(1.0, ge=0)
    causal: float = Field(1.0, ge=0)
    anchor: float = Field(1.0, ge=0)
    kl: float = Field(0.02, ge=0)
    margin: float = Field(0.01, gt=0)
    anchor_margin: float = Field(0.005, gt=0)
    sparsity: float = Field(0.01, ge=0)
    sparsity_target: float = Field(0.05, ge=0, le=1)
    advance: float = Field(0.85, gt=0, le=1)

    asked_tokens: int = Field(512, ge=2)
    told_tokens: int = Field(8192, ge=1)
    reply_tokens: int = Field(128, ge=1)
    chunk_tokens: int = Field(1024, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str) -> str:
        if value not in ("all", "middle"):
            parse_layers(value)
        return value

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """Indices of the layers with memory in a model of so many; empty = all. Raises RecipeError."""
        if self.layers == "all":
            return ()
        if self.layers == "middle":
            first = depth // 3
            return tuple(range(first, max(first + 1, math.ceil(depth * 0.6))))
        chosen = parse_layers(self.layers)
        if beyond := [i for i in chosen if i >= depth]:
            raise RecipeError(f"--layers: {self.layers} names layer {beyond[0]}, but the model has {depth}")
        return chosen

    def adapter_config(self, depth: int) -> DeltaMemConfig:
        """Configuration of the adapter for a model of ``depth`` layers."""
        return DeltaMemConfig(
            rank=self.rank,
            alpha=self.alpha,
            num_state_heads=self.state_heads,
            delta_heads=self.delta_heads,
            target_layers=self.layer_indices(depth),
            output_init=self.output_init,
            online_gain=self.online_gain,
            beta_bias_init=self.beta_bias,
            memory_write_granularity=self.granularity,
        )

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of ``steps``."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if self.schedule == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "late":
            return self.rate * min(1.0, max(0.02, (1 - step / steps) / 0.2))
        return self.rate


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "rank": 16,
        "alpha": 16.0,
        "state_heads": 4,
        "layers": "middle",
        "output_init": "random",
        "beta_bias": -4.0,
        "rate": 2e-3,
        "beta2": 0.98,
        "warmup": 0.02,
        "schedule": "late",
        "steps": 600,
        "batch": 8,
        "rows": 8,
        "state_only": 0.85,
        "plain_share": 0.15,
        "keep": 1.0,
        "keep_replies": 0.25,
        "recalled_weight": 1.0,
        "contrast": 0.0,
        "causal": 0.0,
        "anchor": 0.0,
        "kl": 0.0,
        "sparsity": 0.0,
        "reply_tokens": 24,
        "scope": "sessions",
    },
}


def recipe_of(preset: str, **given: Any) -> Recipe:
    """A preset with some of its fields replaced; None leaves a field as it is. Raises RecipeError naming the option."""
    if preset not in PRESETS:
        raise RecipeError(f"--preset: {preset!r:.80} is none of {', '.join(PRESETS)}")
    if given.get("epochs") is not None and given.get("steps") is None:
        given["steps"] = 0  # as many as the epochs make
    chosen = {"preset": preset, **PRESETS[preset], **{k: v for k, v in given.items() if v is not None}}
    recipe = make_recipe(Recipe, chosen)
    try:
        DeltaMemConfig(delta_heads=recipe.delta_heads)
    except ValidationError as error:
        raise refused(error) from None
    return recipe


def parse_layers(text: str) -> tuple[int, ...]:
    """ "10-17" or "3,5,9-11" as indices in order. Raises RecipeError."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise RecipeError(f'--layers: {text!r:.80} is no list of layers, like "10-17", "3,5", "all" or "middle"')
        if int(last or first) > 4096:
            raise RecipeError(f"--layers: {text!r:.80} names layers beyond 4096")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
