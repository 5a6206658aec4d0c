"""One run from a model's folder and a file of questions and answers to an adapter's folder, or a model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, set_seed

from mem_triton.store.bank.fingerprint import model_fingerprint
from mem_triton.store.files import read_object, write_durably
from mem_triton.systems.memo.training.recipe import MemoRecipe, recipe_of
from mem_triton.systems.memo.training.rows import digest, read_data
from mem_triton_transformers.memo_training.card import describe
from mem_triton_transformers.memo_training.packing import packs, tokens_of
from mem_triton_transformers.memo_training.sft import SFTConfig
from mem_triton_transformers.memo_training.trainer import COLUMNS, WHOLE, MemoTrainer, Plan, Watcher
from mem_triton_transformers.runs.folders import TrainingError, differences, identity_of, load, prepare
from mem_triton_transformers.runs.journal import CURVE, LOG, Journal

LATER = ("weights", "patience", "epochs")
"""Fields of a recipe that may change when a run goes on: its length, and what is written."""


def train(
    folder: Path,
    data: Path,
    out: Path,
    preset: str = "paper",
    *,
    held_out: Path | None = None,
    mix: Sequence[Path] = (),
    name: str = "",
    device: str | None = None,
    save_every: int = 50,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
    say: Callable[[str], None] = lambda text: None,
    **given: Any,
) -> dict[str, Any] | None:
    """Train the model of ``folder`` on questions and answers and write to ``out``, or go on with the run there.

    name: what card and adapter call the model. given: fields of the recipe that replace the preset's. stop: asked after
    each step. tell: gets the log's lines, say: sentences. Returns a report, None if the run was stopped before its
    end. Raises RowError, RecipeError, TrainingError, ValueError, OSError.
    """
    rows, aside = read_data(data, held_out, mix)
    recipe_of(preset, **given)  # refuses options before a model is loaded
    prepare(out)
    model, tokenizer = load(folder, given.get("dtype") or "auto", device)
    recipe = recipe_of(preset, sum(p.numel() for p in model.parameters()), **given)
    identity = identity_of(recipe.model_dump(), model_fingerprint(folder).model_dump_json(), digest([*rows, *aside]))
    checkpoint = _checkpoint(out, identity)
    most = recipe.most_tokens
    learned, asked = ([tokens_of(tokenizer, row, most) for row in some] for some in (rows, aside))
    packing = packs(model)
    model = _trainable(model, recipe, name or folder.name)
    plan = Plan(rows, recipe)
    steps = plan.ends[-1]
    trainer = MemoTrainer(
        plan=plan,
        train=learned,
        held_out=asked,
        packing=packing,
        model=model,
        args=_arguments(out, recipe, plan, device),
        processing_class=tokenizer,
        optimizers=_optimizer(model, recipe, steps),
    )
    journal = Journal(out, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0, COLUMNS)
    watcher = Watcher(trainer, recipe, journal, save_every, partial(_keep, model, out), stop, tell)
    trainer.remove_callback(PrinterCallback)  # its lines on stdout would stand before the report
    trainer.add_callback(watcher)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if checkpoint:
        say(f"going on from step {journal.lines[-1]['step'] if journal.lines else 0} of {steps}")
    say(f"{count} parameters, {len(rows)} rows, {len(aside)} held out, {steps} steps of about {recipe.batch} rows")
    if not watcher.over:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except FloatingPointError as error:
            raise TrainingError(f"{error}; lower --rate, or train with --dtype float32") from None
    if not watcher.over:
        return None
    _finish(out, recipe)
    if recipe.method == "full":
        tokenizer.save_pretrained(out)
    lines = journal.lines
    found = [one for one in watcher.evaluations() if "exact" in one]
    best = max(found, key=lambda one: (one["exact"], -one["held_out_loss"]), default={})
    last = next((line for line in reversed(lines) if "seconds" in line), {})
    report = {
        "out": str(out),
        "method": recipe.method,
        "parameters": count,
        "steps": max((line["step"] for line in lines), default=0),
        "epochs": max((line["epoch"] for line in lines), default=0),
        "rows": len(rows),
        "digest": identity["data"],
        "held_out": {"rows": len(aside), "exact": best.get("exact"), "epoch": best.get("epoch")},
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "seconds": last.get("seconds", 0.0),
        "cpu_seconds": last.get("cpu_seconds", 0.0),
        "log": str(out / LOG),
        "curve": str(out / CURVE),
    }
    describe(out, recipe, report, name or folder.name, data, mix, found, command)
    return report


def _trainable(model: Any, recipe: MemoRecipe, name: str) -> Any:
    set_seed(recipe.seed)
    if recipe.method == "full":
        return model.float().requires_grad_(True)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def _arguments(out: Path, recipe: MemoRecipe, plan: Plan, device: str | None) -> SFTConfig:
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=plan.ends[-1],
        per_device_train_batch_size=recipe.rows,
        gradient_accumulation_steps=plan.parts,
        learning_rate=recipe.rate,
        max_grad_norm=recipe.clip,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=on_cpu,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=recipe.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _optimizer(model: Any, recipe: MemoRecipe, steps: int) -> tuple[AdamW, LambdaLR]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (recipe.beta1, recipe.beta2)
    optimizer = AdamW(parameters, lr=recipe.rate, betas=betas, weight_decay=recipe.weight_decay)
    return optimizer, LambdaLR(optimizer, partial(recipe.rate_at, steps=steps))


def _checkpoint(out: Path, identity: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of this very run; None for a new one. Raises TrainingError for one of another."""
    path = out / "trainer" / "run.json"
    if path.exists():
        before = read_object(path, f"remove {path.parent} to begin anew", TrainingError)
        if changed := differences(before, identity, LATER):
            raise TrainingError(
                f"OUT: {out} holds a run with {changed}; give the same options to go on with it, or another folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda temporary: temporary.write_text(json.dumps(identity, indent=1)) and None)
    found = sorted(path.parent.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for folder in found:
        if not (folder / WHOLE).exists():  # a kill came while it was written
            shutil.rmtree(folder, ignore_errors=True)
    return next((folder for folder in reversed(found) if folder.exists()), None)


def _keep(model: Any, out: Path) -> None:
    """Write what has been learned to ``trainer/best``, whole or not at all."""
    folder = out / "trainer" / "best"
    partial_folder = folder.with_name("best.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.save_pretrained(partial_folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.replace(folder)


def _finish(out: Path, recipe: MemoRecipe) -> None:
    """Copy the best epoch to OUT in the precision that it is kept in."""
    import safetensors.torch

    for path in sorted((out / "trainer" / "best").iterdir()):
        if path.suffix == ".safetensors":
            dtype = getattr(torch, recipe.weights)
            tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(path).items()}
            write_durably(
                out / path.name, lambda p, tensors=tensors: safetensors.torch.save_file(tensors, p, {"format": "pt"})
            )
        elif path.name != "README.md":
            shutil.copyfile(path, out / path.name)
