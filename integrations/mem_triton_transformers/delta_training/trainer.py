"""The training loop: batches are chosen by step and seed alone, so a run that was killed goes on as if it had not been.

No Trainer of transformers or trl: their step is one call over a batch of independent rows. Here a step is several calls
with a state, and its graph, between them, and a run must go on exactly. On one device accelerate would add nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mem_triton.systems.delta_mem import DeltaMemAdapter
from mem_triton.systems.delta_mem.training.recipe import Recipe
from mem_triton.systems.delta_mem.training.tokens import Session
from mem_triton_transformers.delta_training import checkpoint
from mem_triton_transformers.delta_training.checkpoint import RunProgress
from mem_triton_transformers.delta_training.evaluate import evaluate
from mem_triton_transformers.delta_training.forward import SessionRunner
from mem_triton_transformers.delta_training.losses import BatchLoss, keep_loss, memory_loss
from mem_triton_transformers.memory import set_memory_write
from mem_triton_transformers.runs.folders import TrainingError
from mem_triton_transformers.runs.journal import Journal
from mem_triton_transformers.training import adapter_from, trainable_adapter

CURRENT = 0.6
"""Share of batches of the curriculum's present stage; others are of any stage up to it."""
SMOOTHING = 0.9


@dataclass
class Data:
    """Sessions by their use: those that tell something, by stage; those that tell nothing; and held-out ones."""

    train: Sequence[Session]
    held_out: Sequence[Session]
    stages: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.plain = [session for session in self.train if not session.told]
        telling = [session for session in self.train if session.told]
        self.stages = sorted({session.stage for session in telling})
        self.by_stage = [[s for s in telling if s.stage == stage] for stage in self.stages]
        if not telling:
            raise TrainingError("DATA: no row tells anything before its last request, so there is nothing to remember")


class Trainer:
    """One run, new or gone on with from the newest checkpoint of its folder.

    identity: of ``runs.folders.identity_of``. steps: of the whole run. Raises TrainingError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        data: Data,
        out: Path,
        identity: dict[str, Any],
        steps: int,
        start: Callable[[dict[str, torch.nn.Parameter]], None] | None = None,
        pad: int = 0,
    ) -> None:
        self.model, self.recipe, self.data, self.out = model, recipe, data, out
        self.identity, self.steps = identity, steps
        before = checkpoint.latest(out, identity)
        config = recipe.adapter_config(model.config.num_hidden_layers)
        found = trainable_adapter(model, before[0] if before else config, recipe.seed)
        self.parameters = dict(sorted(found.items()))  # one order, fresh or loaded: sums over them round alike
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=recipe.rate,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
        )
        self.progress = before[2] if before else RunProgress()
        if before:
            checkpoint.restore(self.optimizer, self.parameters, before[1])
        elif start is not None:
            set_memory_write(model, False)  # with an empty memory that reads nothing, the model is the frozen one
            start(self.parameters)
        self.runner = SessionRunner(model, recipe.chunk_tokens, pad)
        self.journal = Journal(out, self.progress.step)
        mix = {name: getattr(recipe, name) for name in checkpoint.LATER} | {"steps": steps}
        if mix != self.journal.last("mix"):
            self.journal.write({"step": self.progress.step, "mix": mix})
        self.resumed = bool(before)

    def adapter(self) -> DeltaMemAdapter:
        """The adapter as it is now, for the requests that the recipe says."""
        found = adapter_from(self.model)
        return DeltaMemAdapter(found.config, found.layers, self.recipe.scope)

    def run(
        self,
        save_every: int,
        evaluate_every: int,
        stop: Callable[[], bool] = lambda: False,
        tell: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> bool:
        """Train to the last step, or until ``stop``; True if done. tell: gets each line of the log.

        A checkpoint lies behind every ``save_every`` steps and behind the last one. Raises OSError where the disk ends.
        """
        begun = time.monotonic() - self.progress.seconds
        while self.progress.step < self.steps:
            line = self.step()
            self.progress.seconds = time.monotonic() - begun
            line["seconds"] = round(self.progress.seconds, 1)
            self.journal.write(line)
            tell(line)
            done, stopped = self.progress.step, stop()
            last = done == self.steps or stopped
            if last or done % save_every == 0:
                self.save()
            if done % evaluate_every == 0 and done < self.steps:
                self._evaluate(tell, everything=False)
            if stopped and done < self.steps:
                return False
        if not any("held_out" in line and line["step"] == self.steps for line in self.journal.lines):
            self._evaluate(tell, everything=True)  # not yet, or a kill came before it
        return True

    def _evaluate(self, tell: Callable[[dict[str, Any]], None], everything: bool) -> None:
        if self.data.held_out:
            stage = self.data.stages[self.progress.stage]
            line = {"step": self.progress.step, "stage": stage, "held_out": self.evaluate(everything)}
            self.journal.write(line)
            tell(line)

    def evaluate(self, everything: bool = True) -> dict[str, Any]:
        """The held-out sessions of all stages, or of those so far, and the plain ones."""
        reached = self.data.stages[-1 if everything else self.progress.stage]
        some = [s for s in self.data.held_out if not s.told or s.stage <= reached]
        return evaluate(self.runner, some, max(2, self.recipe.rows))

    def save(self) -> Path:
        """Write a checkpoint."""
        return checkpoint.save(self.out, self.adapter(), self.parameters, self.optimizer, self.progress, self.identity)

    def step(self) -> dict[str, Any]:
        """One step of the optimizer; its line of the log."""
        recipe, progress = self.recipe, self.progress
        rng = random.Random(f"{recipe.seed} {progress.step}")
        rate = recipe.rate_at(progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        parts = max(1, recipe.batch // recipe.rows)
        total, recalled, exact, kinds, tokens = 0.0, [], [], [], 0
        for _ in range(parts):
            kind, outcome, count = self._part(rng)
            (outcome.loss / parts).backward()
            total += outcome.loss.item() / parts
            tokens += count
            kinds.append(kind)
            recalled += [] if outcome.recalled is None else [outcome.recalled]
            if outcome.exact is not None:
                exact += outcome.exact.tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"step {progress.step + 1}: the gradient is not finite; lower --rate, or train with --dtype float32; "
                "the same command goes on from the last checkpoint"
            )
        self.optimizer.step()
        progress.step += 1
        if exact and all(kind == "current" for kind in kinds):
            progress.right = SMOOTHING * progress.right + (1 - SMOOTHING) * sum(exact) / len(exact)
        line = {
            "step": progress.step,
            "stage": self.data.stages[progress.stage],
            "kind": kinds[0],
            "loss": total,
            "recalled_loss": sum(recalled) / len(recalled) if recalled else None,
            "exact": sum(exact) / len(exact) if exact else None,
            "right": progress.right,
            "rate": rate,
            "norm": norm.item(),
            "tokens": tokens,
        }
        if progress.right > recipe.advance and progress.stage < len(self.data.stages) - 1:
            progress.stage, progress.right = progress.stage + 1, 0.0
        return line

    def _part(self, rng: random.Random) -> tuple[str, BatchLoss, int]:
        """The loss of one group of rows, its kind, and the tokens of its rows."""
        recipe, data, stage = self.recipe, self.data, self.progress.stage
        plain = bool(data.plain) and rng.random() < recipe.plain_share
        current = rng.random() < CURRENT or stage == 0
        pool = data.by_stage[stage] if current else [s for some in data.by_stage[: stage + 1] for s in some]
        sessions = _draw(rng, pool, recipe.rows)
        if plain:
            rows = _draw(rng, data.plain, recipe.rows)
            others = sessions[: len(rows)] if rng.random() < 0.5 and len(sessions) >= len(rows) else None
            self._fit([*rows, *(others or [])])
            return "plain", keep_loss(self.runner, recipe, rows, others), sum(s.tokens for s in rows)
        self._fit(sessions)
        outcome = memory_loss(self.runner, recipe, rng, sessions)
        kind = "context" if outcome.exact is None else "current" if current else "earlier"
        return kind, outcome, sum(s.tokens for s in sessions)

    def _fit(self, sessions: Sequence[Session]) -> None:
        """Compute calls again in the backward pass where a session is longer than one call."""
        self.runner.recompute = max(session.tokens for session in sessions) > self.recipe.chunk_tokens


def _draw(rng: random.Random, pool: Sequence[Session], count: int) -> list[Session]:
    return rng.sample(pool, min(count, len(pool)))
