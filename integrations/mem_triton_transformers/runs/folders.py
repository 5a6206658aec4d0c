"""The folder of a run, the model that it trains from, and what a run that goes on must share with the one before."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class TrainingError(ValueError):
    """A run that cannot begin or go on; the message names the folder and the fix."""


def prepare(out: Path) -> None:
    """Make the folder and see that it can be written. Raises TrainingError."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"OUT: {out} cannot be written: {error.strerror or error}; give another folder") from None
    for left in (out / "trainer").glob("*.partial"):  # of a run that was killed as it saved
        shutil.rmtree(left, ignore_errors=True)


def load(folder: Path, dtype: str, device: str | None) -> tuple[PreTrainedModel, Any]:
    """The frozen model and its tokenizer. Raises ValueError for folders that cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except Exception as error:  # whatever transformers makes of a damaged config, tokenizer or tensor
        raise ValueError(f"MODEL: {folder} cannot be loaded: {type(error).__name__}: {error}") from None
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"MODEL: {folder} has no chat template, so a conversation has no tokens: train a chat model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().requires_grad_(False).to(device), tokenizer


def identity_of(recipe: Mapping[str, Any], model: str, data: str) -> dict[str, Any]:
    """What a run that goes on must share with the one before. model: its fingerprint. data: a digest."""
    return {"recipe": dict(recipe), "model": model, "data": data}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], later: Collection[str]) -> str:
    """What differs between two identities and must not, for a message; empty if nothing does. later: fields of a recipe
    that may change when a run goes on."""
    old, new = before.get("recipe", {}), now["recipe"]
    changed = [k for k in new if k not in later and old.get(k) != new[k]]
    named = [f"--{k.replace('_', '-')} {old.get(k)}, not {new[k]}" for k in changed]
    named += [f"another {what}" for what in ("model", "data") if before.get(what) != now[what]]
    return ", ".join(named)
