"""The models whose layers are measured, and random tensors for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    """Widths of one layer, from the model's config.json; Memory³-2B's from arXiv 2407.01178, section 3."""

    name: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-4b", 36, 2560, 32, 8, 128),
        Model("qwen3-8b", 36, 4096, 32, 8, 128),
        Model("llama3-8b", 32, 4096, 32, 8, 128),
        Model("memory3-2b", 44, 3200, 40, 8, 80),
    )
}
TINY = Model("tiny", 2, 64, 4, 2, 32)  # for tests; a name like any other, but not one of the default


def find(names: Iterable[str]) -> list[Model]:
    """Models by name. ValueError names the unknown one and those that are known."""
    known = {**MODELS, TINY.name: TINY}
    for name in names:
        if name not in known:
            raise ValueError(f"--models: {name!r} is unknown, expected some of {', '.join(known)}")
    return [known[name] for name in names]


def by_attention(models: Iterable[Model]) -> list[tuple[Model, tuple[str, ...]]]:
    """One model of each attention shape, with the names of all that have it: their cases are the same."""
    groups: dict[tuple[int, ...], list[Model]] = {}
    for model in models:
        groups.setdefault((model.query_heads, model.kv_heads, model.head_dim), []).append(model)
    return [(min(group, key=lambda m: m.layers), tuple(m.name for m in group)) for group in groups.values()]


class Random:
    """Seeded tensors on a device; on "meta" their shapes alone."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        """int32 [count]."""
        return torch.randperm(count, generator=self.generator, device=self.device).int()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32, low <= x < high."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device).int()
