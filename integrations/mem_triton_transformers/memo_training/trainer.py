"""trl's SFTTrainer with packed batches in an order that seed and step decide, and a log, checkpoints and evaluations.

Logits are computed of answer tokens alone: the head of a small model costs as much as its layers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mem_triton.systems.memo.training.recipe import MemoRecipe
from mem_triton.systems.memo.training.rows import Row, of_epoch
from mem_triton_transformers.memo_training.packing import IGNORED, Tokens, packed, padded
from mem_triton_transformers.memo_training.sft import SFTTrainer
from mem_triton_transformers.runs.journal import Journal

COLUMNS = ("step", "epoch", "loss", "rate", "norm", "tokens", "seconds", "cpu_seconds")


class Plan:
    """Which rows each forward call has, from the first step to the last, as a batch sampler.

    An epoch is cut into steps of about ``recipe.batch`` rows, a step into ``parts`` calls, as evenly as it goes.
    """

    drop_last = False

    def __init__(self, rows: Sequence[Row], recipe: MemoRecipe) -> None:
        self.ends: list[int] = []  # the last step of each epoch
        epochs = [of_epoch(rows, epoch) for epoch in range(recipe.epochs)]
        fewest = min(max(1, len(some) // max(1, round(len(some) / recipe.batch))) for some in epochs)
        self.parts = min(fewest, -(-recipe.batch // recipe.rows))
        self.batches: list[list[int]] = []
        for epoch, some in enumerate(epochs):
            random.Random(f"{recipe.seed} {epoch}").shuffle(some)
            for step in _cut(some, max(1, round(len(some) / recipe.batch))):
                self.batches += _cut(step, self.parts)
            self.ends.append(len(self.batches) // self.parts)
        self.batch_size = recipe.rows

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, to which step 1, 2, ... belongs."""
        return next((i for i, end in enumerate(self.ends, 1) if step <= end), len(self.ends))


def _cut(items: Sequence[int], parts: int) -> list[list[int]]:
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in pairwise(bounds)]


class MemoTrainer(SFTTrainer):
    """plan: of the run. train, held_out: tokens of the rows. packing: whether rows share one sequence."""

    def __init__(self, *, plan: Plan, train: Sequence[Tokens], held_out: Sequence[Tokens], packing: bool, **told: Any):
        self.plan, self.held_out, self.packing, self.tokens = plan, held_out, packing, 0
        rows = [{"input_ids": list(row.ids), "labels": [IGNORED] * len(row.ids)} for row in train[:1]]
        self.rows, self.fill = train, told["processing_class"].pad_token_id or 0
        super().__init__(train_dataset=Dataset.from_list(rows), data_collator=self.collate, **told)

    def collate(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        return (packed(rows) if self.packing else None) or padded(rows, self.fill)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_sampler=self.plan, collate_fn=self.collate)  # type: ignore[arg-type]

    def answers(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits [N, V], labels [N]) of the answer tokens of a batch."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        told = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = model.base_model(**told, use_cache=False).last_hidden_state
        labels = inputs["labels"]
        if (positions := inputs.get("position_ids")) is not None:
            return self._packed_answers(model, hidden[0], labels[0], positions[0])
        kept = labels[:, 1:] != IGNORED
        return model.get_output_embeddings()(hidden[:, :-1][kept]), labels[:, 1:][kept]

    @staticmethod
    def _packed_answers(model: Any, hidden: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        at = (labels != IGNORED).nonzero()[:, 0]  # a row's own part begins with a token of its prompt
        return model.get_output_embeddings()(hidden[at - 1]), labels[at]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, labels = self.answers(inputs)
        self.tokens += inputs["input_ids"].numel()
        total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss of the held-out answers, and the share that greedy decoding would give exactly: no token is another."""
        if not self.held_out:
            return {}
        self.model.eval()
        loss, count, exact = 0.0, 0, 0
        size = self.plan.batch_size
        for begin in range(0, len(self.held_out), size):
            rows = self.held_out[begin : begin + size]
            inputs = self._prepare_inputs(self.collate(rows))
            with self.compute_loss_context_manager():
                logits, labels = self.answers(inputs)
            loss += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            right = (logits.argmax(-1) == labels).tolist()
            for row in rows:
                exact += all(right[: row.answer])
                right = right[row.answer :]
                count += row.answer
        self.model.train()
        return {"held_out_loss": loss / count, "exact": exact / len(self.held_out)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics["train"].clear()  # trl's own, which need the logits of every token
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super(SFTTrainer, self)._save_checkpoint(model, trial)  # without trl's model card
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / WHOLE).write_text("")


WHOLE = "whole"
"""The file of a checkpoint that is written last."""


class Watcher(TrainerCallback):
    """Logs each step, evaluates after each epoch, keeps the best epoch, and ends the run when it is time.

    best: gets the model of an epoch that is better than those before. stop: asked after each step.
    """

    def __init__(
        self,
        trainer: MemoTrainer,
        recipe: MemoRecipe,
        journal: Journal,
        save_every: int,
        best: Callable[[], None],
        stop: Callable[[], bool],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.trainer, self.recipe, self.journal, self.save_every = trainer, recipe, journal, save_every
        self.best, self.stop, self.tell = best, stop, tell
        self.seconds, self.cpu = journal.last("seconds") or 0.0, journal.last("cpu_seconds") or 0.0
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun, self.cpu_begun = time.monotonic() - self.seconds, time.process_time() - self.cpu
        step = state.global_step
        if step in self.trainer.plan.ends and all(one["step"] != step for one in self.evaluations()):
            self.evaluate(step)  # a kill came between the checkpoint and this
        control.should_training_stop = self.over

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs or "grad_norm" not in logs:
            return
        if not math.isfinite(logs["grad_norm"]):
            raise FloatingPointError(f"step {state.global_step}: the gradient is not finite")
        line = {"step": state.global_step, "epoch": self.trainer.plan.epoch_of(state.global_step)}
        line |= {"loss": logs["loss"], "rate": logs["learning_rate"], "norm": float(logs["grad_norm"])}
        line |= {"tokens": self.trainer.tokens, **self._times()}
        self.trainer.tokens = 0
        self._write(line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, plan = state.global_step, self.trainer.plan
        self.stopped = self.stop()
        control.should_log = True
        control.should_save = step % self.save_every == 0 or step in plan.ends or self.stopped
        control.should_training_stop = control.should_training_stop or self.stopped or step == plan.ends[-1]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.trainer.plan.ends:
            self.evaluate(state.global_step)
            control.should_training_stop = control.should_training_stop or self.early

    def evaluate(self, step: int) -> None:
        """Evaluate behind an epoch, and keep what has been learned if no epoch was better."""
        found, earlier = self.trainer.evaluate(), self.evaluations()
        line = {"step": step, "epoch": self.trainer.plan.epoch_of(step), "held_out": len(self.trainer.held_out)}
        if not found or all(_rank(found) > _rank(one) for one in earlier):
            self.best()
        self._write({**line, **self._times(), **found})

    @property
    def early(self) -> bool:
        """Whether the held-out answers have not risen for as many epochs as the recipe waits."""
        found = self.evaluations()
        if not self.recipe.patience or not found or "exact" not in found[0]:
            return False
        first = max(found, key=lambda one: one["exact"])  # of equal ones the first
        return found[-1]["epoch"] - first["epoch"] >= self.recipe.patience

    @property
    def over(self) -> bool:
        """Whether the last epoch, or one that ends the run early, is evaluated."""
        return self.early or any(one["step"] == self.trainer.plan.ends[-1] for one in self.evaluations())

    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of the log about held-out rows."""
        return [line for line in self.journal.lines if "held_out" in line]

    def _times(self) -> dict[str, float]:
        return {
            "seconds": round(time.monotonic() - self.begun, 1),
            "cpu_seconds": round(time.process_time() - self.cpu_begun, 1),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.journal.write(line)
        self.journal.lines.append(line)
        self.tell(line)


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    """How good an evaluation is: exact answers, then the loss."""
    return found.get("exact", 0.0), -found.get("held_out_loss", 0.0)
