"""Merges tensors: linear, task arithmetic, TIES, DARE and slerp (fact D7).

Task arithmetic: arXiv 2212.04089; TIES: arXiv 2306.01708; DARE: arXiv 2311.03099. Pruning and the election of signs
are peft's (``peft.utils.merge_utils``). Weights are applied where the papers apply them: peft's own ``ties`` scales
after the trim, so that equal weights of a half halve the result; here they say how much a model counts in the election
and in the mean of those that agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["linear", "task", "ties", "dare_linear", "dare_ties", "slerp"]
METHODS: tuple[str, ...] = get_args(Method)
NEED_BASE = frozenset({"task", "ties", "dare_linear", "dare_ties"})
PRUNE = frozenset({"ties", "dare_linear", "dare_ties"})
PARALLEL = 1e-6
"""Sine of the angle below which slerp is the straight line."""


class MergeError(ValueError):
    """A merge that cannot be made as asked; the message names the option, the folder or the tensor."""


@dataclass(frozen=True)
class MergeRecipe:
    """How to merge. weights: one a model, () for the method's own. density: share of a difference that is kept.

    t: where on the arc from the first to the second model, of slerp. scale: of the merged difference. seed: of DARE.
    """

    method: Method
    weights: tuple[float, ...] = ()
    density: float = 0.3
    t: float = 0.5
    scale: float = 1.0
    seed: int = 0

    def check(self, models: int, based: bool) -> None:
        """Raise MergeError naming the option for what cannot be. based: whether there is a base model."""
        if self.method not in METHODS:
            raise MergeError(f"--method: one of {', '.join(METHODS)}, got {self.method!r}")
        if models < 1 or (self.method == "slerp" and models != 2):
            raise MergeError(f"--method {self.method}: takes {'two models' if models else 'models'}, got {models}")
        if self.weights and len(self.weights) != models:
            raise MergeError(f"--weights: {len(self.weights)} for {models} models")
        if self.weights and self.method == "slerp":
            raise MergeError("--weights: slerp has none; --t says where between the two models")
        if not all(map(math.isfinite, (*self.weights, self.scale))):
            raise MergeError("--weights, --scale: finite numbers alone")
        if self.method in PRUNE and not 0 < self.density <= 1:
            raise MergeError(f"--density: above 0 and at most 1, got {self.density:g}")
        if self.method == "slerp" and not 0 <= self.t <= 1:
            raise MergeError(f"--t: from 0 to 1, got {self.t:g}")
        if self.method in NEED_BASE and not based:
            raise MergeError(f"--base: {self.method} merges differences from the base model; name it")

    def weights_of(self, models: int) -> list[float]:
        """As given; else equal shares for an average, and 1 for differences."""
        return list(self.weights) or [1 / models if self.method == "linear" else 1.0] * models


def merge(recipe: MergeRecipe, tensors: Sequence[Tensor], base: Tensor | None = None, name: str = "") -> Tensor:
    """One tensor of the merged model, in the first one's dtype; computed in fp32, or fp64 where it is that.

    name: the tensor's; what DARE drops depends on it, not on the order of tensors.
    """
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    if recipe.method == "slerp":
        return slerp(tensors[0], tensors[1], recipe.t)
    models = [tensor.to(wide) for tensor in tensors]
    weights = torch.tensor(recipe.weights_of(len(models)), dtype=wide).view(-1, *[1] * models[0].dim())
    if recipe.method == "linear":
        return (torch.stack(models) * weights).sum(0).to(tensors[0].dtype)
    assert base is not None
    start = base.to(wide)
    differences = [model - start for model in models]
    merged = merge_differences(recipe, differences, weights, name)
    return (start + recipe.scale * merged).to(tensors[0].dtype)


def merge_differences(recipe: MergeRecipe, differences: list[Tensor], weights: Tensor, name: str) -> Tensor:
    """The merged difference from the base. weights: [K, 1, ...]."""
    kept = torch.stack([_pruned(recipe, one, f"{name}/{i}") for i, one in enumerate(differences)])
    if recipe.method in ("task", "dare_linear"):
        return (kept * weights).sum(0)
    return elect(kept, weights)


def elect(kept: Tensor, weights: Tensor) -> Tensor:
    """TIES' last two steps: the sign with the greater total, and the weighted mean of those that have it.

    kept: trimmed differences, [K, ...]. A negative weight turns its difference round.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask

    turned = kept * weights
    agree = calculate_majority_sign_mask(turned, method="total")
    share = (agree * weights.abs()).sum(0)
    return torch.where(share > 0, (turned * agree).sum(0) / share.clamp(min=torch.finfo(kept.dtype).tiny), 0.0)


def _pruned(recipe: MergeRecipe, difference: Tensor, name: str) -> Tensor:
    """What is kept of a difference: all, its greatest values, or random ones, scaled up by what was dropped."""
    from peft.utils.merge_utils import prune

    if recipe.method == "task" or recipe.density >= 1 or difference.numel() == 0:
        return difference
    if recipe.method == "ties":
        return prune(difference, recipe.density, method="magnitude")
    digest = hashlib.sha256(f"{recipe.seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return prune(difference, recipe.density, method="random", rescale=True)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at ``t`` on the arc between two tensors, taken as vectors; in the first one's dtype.

    Parallel and opposite vectors, and those that are zero, have no arc: the straight line is taken.
    """
    if t in (0, 1):
        return (second if t else first).to(first.dtype).clone()
    a, b = first.double().flatten(), second.double().flatten()
    norms = a.norm() * b.norm()
    cosine = torch.clamp(a @ b / norms, -1, 1) if norms > 0 else torch.tensor(1.0, dtype=a.dtype)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    if sine < PARALLEL:
        merged = (1 - t) * a + t * b
    else:
        merged = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return merged.view_as(first).to(first.dtype)
