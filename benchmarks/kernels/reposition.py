"""``reposition_pages``: keys of memory pages turned to their positions, on loading them or where they lie."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Gate, Operation, Setup, Variant, relative_rms
from benchmarks.kernels.roofline import Work
from benchmarks.kernels.shapes import Model, Random, by_attention
from mem_triton.ops.reposition import RotaryEmbedding, reposition_pages
from mem_triton.ops.reposition.reference import move, rotate

THETA = 1e6
REACH = 4096  # positions lie below
ROUNDED = {"bf16": 3e-3, "fp16": 5e-4, "fp32": 1e-6}  # a key is rounded once
SINGLE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 5e-4}  # and its angle is an fp32 number


class Layer(NamedTuple):
    pool: Tensor  # [pages, Hkv, P, D]
    source: Tensor  # the same, before RoPE; [0] where keys are moved in place
    positions: Tensor  # int32 [pages, Hkv, P]
    old: Tensor  # int32, where the keys are, in place
    page: Tensor  # int32 [pages], a permutation


def cases(models: list[Model], dtype: str, gpu: bool) -> list[Case]:
    """Five references of 8 kept tokens for 1, 16, 256 requests; dense prefixes; a whole pool moved after an update."""
    found, scale = [], 1 if gpu else 16
    problems = [
        *((f"load {5 * n} pages of 8", 5 * n, 8, 0) for n in ((1, 16, 256) if gpu else (1, 16))),
        (f"load {160 // scale} pages of 128", 160 // scale, 128, 0),
        (f"move {12800 // scale} tokens", 100 // scale + (100 % scale > 0), 128, 1),
    ]
    for name, pages, tokens, in_place in problems:
        for model, names in by_attention(models):
            sizes = {
                "pages": pages,
                "page_tokens": tokens,
                "in_place": in_place,
                "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
            }
            found.append(Case("reposition", names, name, dtype, sizes, model.layers))
    return found


def build(case: Case, device: str, seed: int) -> Layer:
    g, s = Random(device, seed), case.sizes
    shape = (s["pages"], s["kv_heads"], s["page_tokens"])
    keys = g.normal(*shape, s["head_dim"], dtype=case.torch_dtype)
    places = [g.integers(-REACH, REACH, *shape) for _ in range(2)]
    page = g.permutation(s["pages"])
    if s["in_place"]:
        return Layer(keys, keys.new_empty(0), *places, page)
    return Layer(torch.empty_like(keys), keys, *places, page)


def work(case: Case) -> Work:
    """Every key in and out, its positions, and three operations for each of its numbers (two products, a sum)."""
    s = case.sizes
    tokens = s["pages"] * s["kv_heads"] * s["page_tokens"]
    positions = tokens * 4 * (1 + s["in_place"]) + 4 * s["pages"]
    return Work(2 * tokens * s["head_dim"] * case.torch_dtype.itemsize + positions, 3 * tokens * s["head_dim"])


def rope_of(case: Case) -> RotaryEmbedding:
    size = case.sizes["head_dim"]
    return RotaryEmbedding(size, tuple(THETA ** (-i / size) for i in range(0, size, 2)))


def turn(keys: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE as models have it: fp32 angles, halves of the head swapped."""
    angle = positions.unsqueeze(-1).float() * frequencies
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    first, second = keys.float().chunk(2, -1)
    return (keys.float() * cos + torch.cat([-second, first], -1) * sin).to(keys.dtype)


def variants(case: Case, layer: Layer, setup: Setup) -> list[Variant]:
    rope, in_place = rope_of(case), bool(case.sizes["in_place"])
    start = layer.pool.clone() if in_place else layer.source
    pages = layer.page.long()
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32, device=layer.pool.device)
    change = layer.positions - layer.old if in_place else layer.positions  # one turn by the difference
    options = {"page": layer.page, **({"old_positions": layer.old} if in_place else {"source": layer.source})}

    @functools.cache
    def wanted() -> Tensor:
        keys = (start[pages] if in_place else start).double()
        if in_place:
            return move(keys, layer.old, layer.positions, rope)
        return rotate(keys, layer.positions, rope)

    def torch_turn() -> None:
        layer.pool[pages] = turn(layer.pool[pages] if in_place else layer.source, change, frequencies)

    def copy() -> None:
        layer.pool[pages] = layer.pool[pages] if in_place else layer.source

    places = {"updates": (layer.pool,)} if in_place else {"writes": (layer.pool,)}
    error = lambda _: relative_rms((layer.pool[pages], wanted()))  # noqa: E731
    copied = lambda _: relative_rms((layer.pool[pages], start[pages] if in_place else start))  # noqa: E731
    return [
        Variant(
            "reposition_pages",
            lambda: reposition_pages(layer.pool, layer.positions, rope, **options),
            Gate(error, ROUNDED[case.dtype]),
            work(case),
            **places,
        ),
        Variant(
            "torch",
            torch_turn,
            Gate(error, SINGLE[case.dtype]),
            work(case),
            baseline=True,
            **places,
            note="RoPE as models have it, fp32 angles",
        ),
        Variant(
            "copy",
            copy,
            Gate(copied, 0.0),
            work(case),
            baseline=True,
            **places,
            note="the same keys to the same pages, not turned",
        ),
    ]


OPERATION = Operation("reposition", cases, build, variants)
