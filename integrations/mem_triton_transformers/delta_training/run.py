"""One run from a model's folder and a file of conversations to an adapter's folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.systems.delta_mem import DeltaMemAdapter, save_adapter
from mem_triton.systems.delta_mem.training.conversations import read_conversations
from mem_triton.systems.delta_mem.training.recipe import Recipe
from mem_triton.systems.delta_mem.training.tokens import session_of
from mem_triton_transformers.attach import attention_dims
from mem_triton_transformers.delta_training.card import describe
from mem_triton_transformers.delta_training.replies import with_replies
from mem_triton_transformers.delta_training.start import closed_form
from mem_triton_transformers.delta_training.trainer import Data, Trainer
from mem_triton_transformers.runs.folders import identity_of, load, prepare
from mem_triton_transformers.runs.journal import CURVE, LOG, read

HELD_OUT = 20
"""Without held-out data of its own, every so manieth row is held out."""


def train(
    folder: Path,
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    held_out: Path | None = None,
    name: str = "",
    device: str | None = None,
    save_every: int = 50,
    evaluate_every: int = 25,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Train an adapter for the model of ``folder`` and write it to ``out``, or go on with the run that lies there.

    name: what the card calls the model. stop: asked after each step. tell: gets the log's lines, say: sentences.
    Returns a report, None if the run was stopped before its end. Raises DataError, TrainingError, RecipeError, OSError.
    """
    rows = read_conversations(data)
    if held_out is not None:
        aside = read_conversations(held_out)
    else:
        aside = [row for i, row in enumerate(rows) if i % HELD_OUT == HELD_OUT - 1]
        rows = [row for i, row in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1]
    prepare(out)
    model, tokenizer = load(folder, recipe.dtype, device)
    config = recipe.adapter_config(model.config.num_hidden_layers)
    attention_dims(model, config)  # refuses a model without the projections before anything is computed
    digest = hashlib.sha256(repr([rows, aside]).encode()).hexdigest()
    identity = identity_of(recipe.model_dump(), model_fingerprint(folder).model_dump_json(), digest)
    replies = partial(with_replies, model, tokenizer, most=recipe.reply_tokens, path=out / "replies.jsonl")
    rows, aside = (
        replies(some, progress=lambda done, total: say(f"own replies: {done} of {total}")) for some in (rows, aside)
    )
    sessions = [
        [session_of(tokenizer, row, recipe.asked_tokens, recipe.told_tokens) for row in s] for s in (rows, aside)
    ]
    chosen = Data(*sessions)
    steps = recipe.steps or math.ceil(recipe.epochs * len(rows) / recipe.batch)
    start = (
        partial(closed_form, model, config, chosen.by_stage[0], recipe.seed) if recipe.start == "closed_form" else None
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    longest = max(len(r.ids) for some in sessions for s in some for r in (*s.told, s.asked))
    if model.device.type == "cpu" and longest <= 512:
        model.set_attn_implementation("eager")  # short rows: several times as fast on a CPU as the fused form
    trainer = Trainer(model, recipe, chosen, out, identity, steps, start, pad)
    if trainer.resumed:
        say(f"going on from step {trainer.progress.step} of {steps}")
    count = sum(p.numel() for p in trainer.parameters.values())
    say(f"{count} parameters, {len(rows)} conversations, {len(aside)} held out, {steps} steps")
    if not trainer.run(save_every, evaluate_every, stop, tell):
        return None
    adapter = finished(trainer.adapter(), recipe)
    save_adapter(adapter, out)
    log = read(out / LOG)
    final = next((line["held_out"] for line in reversed(log) if "held_out" in line), {})
    report = {
        "adapter": str(out),
        "fingerprint": adapter.fingerprint,
        "steps": steps,
        "parameters": count,
        "seconds": round(trainer.progress.seconds, 1),
        "stage": chosen.stages[trainer.progress.stage],
        "held_out": final,
        "log": str(out / LOG),
        "curve": str(out / CURVE),
    }
    describe(out, recipe, report, name or folder.name, str(data), len(rows), command)
    return report


def finished(adapter: DeltaMemAdapter, recipe: Recipe) -> DeltaMemAdapter:
    """The adapter in the precision that it is kept in."""
    dtype = getattr(torch, recipe.weights)
    layers = {name: {key: t.to(dtype) for key, t in tensors.items()} for name, tensors in adapter.layers.items()}
    return DeltaMemAdapter(adapter.config, layers, adapter.scope)
