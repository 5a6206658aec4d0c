"""Trains the rows: batches in an order that seed and step decide, AdamW, checkpoints, evaluations."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mem_triton.store.files import write_durably
from mem_triton.systems.explicit.cartridge_recipe import CartridgeRecipe
from mem_triton_transformers.cartridge_training.lessons import Lesson, hidden_states, logits_of
from mem_triton_transformers.runs.folders import TrainingError, differences
from mem_triton_transformers.runs.journal import Journal

COLUMNS = ("step", "loss", "rate", "norm", "tokens", "seconds", "cpu_seconds")
LATER: tuple[str, ...] = ()
"""Fields of a recipe that may change when a run goes on: none, since the learning rate follows from the steps."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class CartridgeTrainer:
    """adapted: peft's model with a CARTRIDGE adapter; model: the frozen one in it. lessons, hidden: what is learned,
    with the teacher's hidden states; aside: the same for evaluation. identity: what a run that goes on must share."""

    def __init__(
        self,
        adapted: Any,
        recipe: CartridgeRecipe,
        lessons: Sequence[Lesson],
        hidden: Sequence[Tensor],
        aside: tuple[Sequence[Lesson], Sequence[Tensor]],
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        self.adapted, self.model, self.recipe = adapted, adapted.get_base_model(), recipe
        self.lessons, self.hidden, self.aside, self.identity = lessons, hidden, aside, identity
        encoder = adapted.prompt_encoder[adapted.active_adapter]
        self.rows = encoder.trainable_embedding
        betas = (recipe.beta1, recipe.beta2)
        self.optimizer = torch.optim.AdamW([self.rows], lr=recipe.rate, betas=betas, weight_decay=0.0)
        self.path = out / "trainer" / "state.safetensors"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.step, self.seconds, self.cpu = self._resume(out)
        self.journal = Journal(out, self.step, COLUMNS)

    def run(
        self, save_every: int, evaluate_every: int, stop: Callable[[], bool], tell: Callable[[dict[str, Any]], None]
    ) -> bool:
        """Train to the end; False if it was stopped before, behind a checkpoint. Raises TrainingError, OSError."""
        begun, cpu = time.monotonic() - self.seconds, time.process_time() - self.cpu
        while self.step < self.recipe.steps:
            line = self._one()
            self.seconds, self.cpu = time.monotonic() - begun, time.process_time() - cpu
            line |= {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu, 1)}
            over = self.step == self.recipe.steps
            stopped = stop()
            if self.step % save_every == 0 or over or stopped:
                self._save()
            self.journal.write(line)
            tell(line)
            if self.aside[0] and (self.step % evaluate_every == 0 or over):
                found = {"step": self.step, "held_out": round(self.divergence(), 6)}
                self.journal.write(found)
                tell(found)
            if stopped and not over:
                return False
        return True

    def divergence(self, alone: bool = False) -> float:
        """KL divergence a token from the teacher on the held-out lessons, in nats: with the rows as they are, or
        ``alone``, with nothing before the question."""
        lessons, hidden = self.aside
        before = 0 if alone else self.recipe.rows
        total, tokens, batch = 0.0, 0, self.recipe.batch
        with torch.no_grad():
            for first in range(0, len(lessons), batch):
                some = lessons[first : first + batch]
                prefix = None if alone else self.adapted.get_prompt(len(some))
                loss, count = self._loss(some, hidden[first : first + batch], prefix, before)
                total, tokens = total + float(loss) * count, tokens + count
        return total / max(1, tokens)

    def _one(self) -> dict[str, Any]:
        rate = self.recipe.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chosen = batch_of(len(self.lessons), self.recipe.batch, self.recipe.seed, self.step)
        lessons, hidden = [self.lessons[i] for i in chosen], [self.hidden[i] for i in chosen]
        loss, tokens = self._loss(lessons, hidden, self.adapted.get_prompt(len(lessons)), self.recipe.rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_([self.rows], self.recipe.clip))
        if not (norm < float("inf") and float(loss.detach()) < float("inf")):
            raise TrainingError(f"step {self.step + 1}: the loss is not a number; lower --rate, or --dtype float32")
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "loss": float(loss.detach()), "rate": rate, "norm": norm, "tokens": tokens}

    def _loss(self, lessons: Sequence[Lesson], hidden: Sequence[Tensor], cache: Any, before: int) -> tuple[Tensor, int]:
        """Mean KL divergence of the student from the teacher over all tokens of the answers, and their number."""
        rows = [(lesson.prompt, lesson.answer) for lesson in lessons]
        student = logits_of(self.model, torch.cat(hidden_states(self.model, rows, cache, before)))
        with torch.no_grad():
            teacher = logits_of(self.model, torch.cat(list(hidden))).log_softmax(-1)
        loss = torch.nn.functional.kl_div(student.log_softmax(-1), teacher, reduction="sum", log_target=True)
        return loss / len(teacher), len(teacher)

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = self.optimizer.state[self.rows]
        tensors = {"rows": self.rows.detach(), **{name: torch.as_tensor(state[name]) for name in MOMENTS}}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        progress = {"step": self.step, "seconds": self.seconds, "cpu": self.cpu}
        about = {"run": json.dumps({"identity": self.identity, "progress": progress})}
        write_durably(self.path, lambda temporary: safetensors.torch.save_file(tensors, temporary, about))

    def _resume(self, out: Path) -> tuple[int, float, float]:
        """Go on from the checkpoint if there is one. Raises TrainingError for one of another run, or a damaged one."""
        if not self.path.exists():
            return 0, 0.0, 0.0
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                run = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in ("rows", *MOMENTS)}
            progress, identity = run["progress"], run["identity"]
            if changed := differences(identity, self.identity, LATER):
                raise TrainingError(
                    f"OUT: {out} holds a run with {changed}; give the same options to go on with it, or another folder"
                )
            with torch.no_grad():
                self.rows.copy_(tensors.pop("rows"))
            self.optimizer.state[self.rows] = {
                name: tensor if name == "step" else tensor.to(self.rows.device) for name, tensor in tensors.items()
            }
            return int(progress["step"]), float(progress["seconds"]), float(progress["cpu"])
        except TrainingError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise TrainingError(f"{self.path}: {error}; remove it to begin anew") from None


def batch_of(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of step 0, 1, ...: each epoch is a new order of all, cut into batches; the last may be smaller."""
    each = -(-count // batch)
    order = list(range(count))
    random.Random(f"{seed} {step // each}").shuffle(order)
    first = step % each * batch
    return order[first : first + batch]
