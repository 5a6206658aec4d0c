"""Merges LoRA adapters by what they add to the weights, ΔW = scaling · B · A.

peft's own weighted adapters of the kinds linear, ties and dare merge A and B apart, which has cross terms
(``peft/tuners/lora/model.py``). Here a sum of adapters is exact, their factors side by side (rank r₁ + r₂ + …); what is
not a sum of factors is computed on ΔW and cut to a rank by its singular values, and the residual is told.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mem_triton.systems.memo.merging.arithmetic import MergeError, MergeRecipe, merge_differences, slerp
from mem_triton.systems.memo.merging.checkpoints import new_folder, write_record

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUMS = frozenset({"linear", "task"})
"""Methods whose result is a sum of adapters, so that its factors are known."""


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: B [out, r] times A [r, in], the scaling in B. Both fp32."""

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        return self.b @ self.a


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter. modules: by the module's name as its file has it."""

    folder: Path
    config: dict[str, Any]
    modules: dict[str, Factors]
    dtype: torch.dtype


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter. Raises MergeError naming the file for one that is damaged, or is no plain LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise MergeError(f"{folder}: cannot be read as an adapter: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise MergeError(f"{folder / CONFIG}: peft_type is not LORA")
    for name in ("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out"):
        if config.get(name):
            raise MergeError(f"{folder / CONFIG}: {name} is set; only plain LoRA adapters are merged")
    if config.get("bias", "none") != "none":
        raise MergeError(f"{folder / CONFIG}: bias {config['bias']!r} is trained; only plain LoRA adapters are merged")
    modules = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors.get(f"{module}.lora_B.weight")
            if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise MergeError(f"{folder / WEIGHTS}: {module} has no B that fits its A")
            modules[module] = Factors(a.float(), b.float() * _scaling(config, module, a.shape[0], folder))
    if other := [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise MergeError(f"{folder / WEIGHTS}: {other[0]} is no factor of a linear layer; it cannot be merged")
    if not modules:
        raise MergeError(f"{folder / WEIGHTS}: holds no LoRA factors")
    return PeftAdapter(folder, config, modules, next(iter(tensors.values())).dtype)


def _scaling(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    try:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (LookupError, TypeError, ValueError) as error:
        raise MergeError(f"{folder / CONFIG}: lora_alpha is no number: {error}") from None


def merge_adapters(recipe: MergeRecipe, folders: list[Path], out: Path, rank: int | None = None) -> dict[str, Any]:
    """Merge adapters of one base model into the new folder ``out``; returns rank and residual.

    rank: of the result; None is the sum of the ranks, which is exact for sums. A weight that one adapter leaves alone
    is merged as a change of nothing. residual: |result − wanted| / |wanted| over all weights, Frobenius.
    """
    if rank is not None and rank < 1:
        raise MergeError(f"--rank: at least 1, got {rank}")
    adapters = read_adapters(recipe, folders)
    names = modules_of(adapters)
    made: dict[str, Factors] = {}
    missed = wanted = 0.0
    for name in names:
        parts = parts_of(adapters, name)
        whole = _cat(recipe, parts) if recipe.method in SUMS else None
        delta = merged_delta(recipe, parts, name) if whole is None else whole.delta
        most = rank or sum(part.a.shape[0] for part in parts)
        factors = whole if whole is not None and whole.a.shape[0] <= most else _cut(delta, most)
        made[name] = Factors(factors.a.to(adapters[0].dtype), factors.b.to(adapters[0].dtype))
        missed += float((made[name].b.float() @ made[name].a.float() - delta).square().sum())
        wanted += float(delta.square().sum())
    widest = max(factors.a.shape[0] for factors in made.values())
    told = {"rank": widest, "residual": math.sqrt(missed / wanted) if wanted else 0.0, "weights": len(made)}
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out))
        save_file(_tensors(made, widest), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(adapters, made, widest), indent=2) + "\n")
        write_record(folder, recipe, folders, None, told)
    return told


def read_adapters(recipe: MergeRecipe, folders: list[Path]) -> list[PeftAdapter]:
    """Read adapters that are to be merged. Raises MergeError for a recipe or adapters that do not fit together."""
    recipe.check(len(folders), based=True)
    adapters = [read_adapter(folder) for folder in folders]
    _check_alike(adapters)
    return adapters


def modules_of(adapters: list[PeftAdapter]) -> list[str]:
    """The modules that one of them changes, sorted."""
    return sorted({name for adapter in adapters for name in adapter.modules})


def parts_of(adapters: list[PeftAdapter], name: str) -> list[Factors]:
    """What each adapter adds to a module; one that leaves it alone adds nothing."""
    return [_of(adapter, name, adapters) for adapter in adapters]


def _check_alike(adapters: list[PeftAdapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        bases = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
        if bases[0] != bases[1]:
            raise MergeError(f"{other.folder}: is for the base model {bases[1]}, {first.folder} is for {bases[0]}")
        for name in first.modules.keys() & other.modules.keys():
            a, b = (adapter.modules[name] for adapter in (first, other))
            if (a.b.shape[0], a.a.shape[1]) != (b.b.shape[0], b.a.shape[1]):
                raise MergeError(f"{name}: has another shape in {other.folder} than in {first.folder}")


def _of(adapter: PeftAdapter, name: str, adapters: list[PeftAdapter]) -> Factors:
    if (found := adapter.modules.get(name)) is not None:
        return found
    other = next(one.modules[name] for one in adapters if name in one.modules)
    return Factors(other.a.new_zeros(0, other.a.shape[1]), other.b.new_zeros(other.b.shape[0], 0))


def _cat(recipe: MergeRecipe, parts: list[Factors]) -> Factors:
    weights = [recipe.scale * w if recipe.method == "task" else w for w in recipe.weights_of(len(parts))]
    scaled = [part.b * weight for part, weight in zip(parts, weights, strict=True)]
    return Factors(torch.cat([part.a for part in parts]), torch.cat(scaled, 1))


def merged_delta(recipe: MergeRecipe, parts: list[Factors], name: str) -> Tensor:
    """What the merged adapter adds to a module's weight, in fp32."""
    if recipe.method in SUMS:
        return _cat(recipe, parts).delta
    deltas = [part.delta for part in parts]
    if recipe.method == "slerp":
        return slerp(deltas[0], deltas[1], recipe.t)
    weights = torch.tensor(recipe.weights_of(len(parts))).view(-1, 1, 1)
    return recipe.scale * merge_differences(recipe, deltas, weights, name)


def _cut(delta: Tensor, rank: int) -> Factors:
    """The nearest product of that rank; the singular values' roots in each factor."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * v[:rank], u[:, :rank] * root)


def _tensors(made: dict[str, Factors], rank: int) -> dict[str, Tensor]:
    """Factors of one rank: engines want the same in all layers, and rows of zeros add nothing."""
    found = {}
    for name, factors in made.items():
        missing = rank - factors.a.shape[0]
        found[f"{name}.lora_A.weight"] = torch.nn.functional.pad(factors.a, (0, 0, 0, missing)).contiguous()
        found[f"{name}.lora_B.weight"] = torch.nn.functional.pad(factors.b, (0, missing)).contiguous()
    return found


def _config(adapters: list[PeftAdapter], made: dict[str, Factors], rank: int) -> dict[str, Any]:
    """The first adapter's configuration with the rank, a scaling of 1, and every module that is changed."""
    modules = sorted({name.rpartition(".")[2] for name in made})
    return adapters[0].config | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
    }
