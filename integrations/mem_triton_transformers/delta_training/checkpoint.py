"""Checkpoints of a training run: written whole or not at all, read without running code.

``trainer/checkpoint-<step>/`` holds the adapter in the authors' format, fp32, so any loader reads it; beside it
``training_state.safetensors``, the optimizer's moments, and ``training_state.json``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mem_triton.systems.delta_mem import AdapterError, DeltaMemAdapter, load_adapter, save_adapter
from mem_triton_transformers.runs.folders import TrainingError, differences

KEPT = 2
"""Checkpoints that are left when a new one is written."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
LATER = ("steps", "epochs", "state_only", "plain_share", "keep", "keep_replies", "weights")
"""Fields of a recipe that may change when a run goes on: its length, the mix of batches, what is written."""


@dataclass
class RunProgress:
    """Where a run is. step: steps done. stage: of the curriculum. right: moving average of exact replies in it."""

    step: int = 0
    stage: int = 0
    right: float = 0.0
    seconds: float = 0.0


def save(
    out: Path,
    adapter: DeltaMemAdapter,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: RunProgress,
    identity: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and remove old ones. identity: what must be the same when the run goes on. Raises OSError."""
    folder = out / "trainer" / f"checkpoint-{progress.step}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(adapter, partial)
    tensors = {
        f"{key}/{name}": torch.as_tensor(optimizer.state[parameter][key]).detach().cpu().clone()
        for name, parameter in parameters.items()
        for key in MOMENTS
        if optimizer.state.get(parameter)
    }
    safetensors.torch.save_file(tensors, partial / "training_state.safetensors")
    state = {"progress": vars(progress), "identity": dict(identity)}
    (partial / "training_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def checkpoints(out: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    found = [p for p in (out / "trainer").glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def latest(out: Path, identity: Mapping[str, Any]) -> tuple[DeltaMemAdapter, dict[str, Tensor], RunProgress] | None:
    """The newest checkpoint that can be read: adapter, moments, progress. None if there is none.

    Raises TrainingError if it is of another model, other data or another recipe, or if all are damaged.
    """
    found, problem = checkpoints(out), ""
    for folder in reversed(found):
        try:
            state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
            progress, before = RunProgress(**state["progress"]), state["identity"]
            moments = safetensors.torch.load_file(folder / "training_state.safetensors")
            adapter = load_adapter(folder)
        except (OSError, ValueError, KeyError, TypeError, AdapterError, safetensors.SafetensorError) as error:
            problem = problem or f"{folder}: {error}"
            continue
        if changed := differences(before, identity, LATER):
            raise TrainingError(
                f"OUT: {out} holds a run with {changed}; give the same options to go on with it, or another folder"
            )
        return adapter, moments, progress
    if found:
        raise TrainingError(f"OUT: no checkpoint can be read ({problem}); remove {out / 'trainer'} to begin anew")
    return None


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """Put an optimizer's moments back."""
    for name, parameter in parameters.items():
        if f"step/{name}" in moments:
            state = {key: moments[f"{key}/{name}"].clone() for key in MOMENTS}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
