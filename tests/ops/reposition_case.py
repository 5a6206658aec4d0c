"""Random pages of keys for ``reposition_pages``, and what the op must leave behind, in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mem_triton.ops.reposition import RotaryEmbedding

TENSORS = ("page", "source", "source_page", "old_positions")


def make_rope(rotary_dim: int, theta: float = 1e4, factor: float = 1.0, interleaved: bool = False) -> RotaryEmbedding:
    inv_freq = tuple(theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    return RotaryEmbedding(rotary_dim, inv_freq, factor, interleaved)


@dataclass
class RepositionCase:
    pool: Tensor
    positions: Tensor
    rope: RotaryEmbedding
    page: Tensor | None = None
    source: Tensor | None = None
    source_page: Tensor | None = None
    old_positions: Tensor | None = None

    def options(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in TENSORS}

    def tensors(self) -> tuple:
        return self.pool, self.positions, *self.options().values()

    def clone(self) -> RepositionCase:
        """With a pool of its own, of the same strides."""
        pool = torch.empty_strided(self.pool.shape, self.pool.stride(), dtype=self.pool.dtype)
        return replace(self, pool=pool.copy_(self.pool))

    def to(self, device: str) -> RepositionCase:
        moved = {n: t.to(device) for n, t in self.options().items() if t is not None}
        return replace(self, pool=self.pool.to(device), positions=self.positions.to(device), **moved)


def make_case(
    rope: RotaryEmbedding,
    *,
    heads: int = 2,
    page_size: int = 16,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    source_dtype: torch.dtype | None = None,
    in_place: bool = False,
    move: bool = False,
    listed: bool = True,
    reach: int = 300,
    seed: int = 0,
) -> RepositionCase:
    """3 items on a pool of 6 pages (one of them skipped if ``listed``), with gaps between tokens, heads and pages."""
    g = torch.Generator().manual_seed(seed)
    count = 3

    def pages(number: int, kind: torch.dtype) -> Tensor:
        whole = torch.randn(number, page_size, heads + 1, head_dim + 8, generator=g).to(kind)
        return whole.transpose(1, 2)[:, 1:, :, 4 : 4 + head_dim]  # token-major, as engines lay caches out

    def integers() -> Tensor:
        return torch.randint(-reach, reach, (count, heads, page_size), generator=g, dtype=torch.int32)

    shuffled = torch.randperm(6, generator=g).int()[:count]
    return RepositionCase(
        pool=pages(6, dtype),
        positions=integers(),
        rope=rope,
        page=torch.where(torch.arange(count) == 1, -1, shuffled).int() if listed else None,
        source=None if in_place else pages(4, source_dtype or dtype),
        source_page=torch.tensor([2, 0, 2], dtype=torch.int32) if listed and not in_place else None,
        old_positions=integers() if move else None,
    )


def expected(case: RepositionCase) -> Tensor:
    """The pool afterwards in fp64, one vector at a time as complex numbers: the text-book form, not ours."""
    pool, rope = case.pool.double().clone(), case.rope
    before = case.pool.double() if case.source is None else case.source.double()
    half = rope.rotary_dim // 2
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64)
    for item in range(len(case.positions)):
        target = item if case.page is None else int(case.page[item])
        origin = item if case.source_page is None else int(case.source_page[item])
        origin = target if case.source is None else origin
        if target < 0:
            continue
        angle = case.positions[item].double()
        if case.old_positions is not None:
            angle = angle - case.old_positions[item].double()
        factor = 1.0 if case.old_positions is not None else rope.attention_factor
        turn = torch.polar(
            torch.full_like(angle, factor)[..., None].expand(*angle.shape, half), angle[..., None] * inv_freq
        )
        keys = before[origin].clone()
        if rope.interleaved:
            x, y = keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        else:
            x, y = keys[..., :half], keys[..., half : 2 * half]
        z = torch.complex(x, y) * turn
        x.copy_(z.real)
        y.copy_(z.imag)
        pool[target] = keys
    return pool


def assert_moved(after: RepositionCase, case: RepositionCase) -> None:
    """Listed pages within rounding of the oracle, all other bits as they were.

    The budget of an element: its dtype's rounding, and a few fp32 roundings of the longest vector there is.
    """
    want = expected(case)
    listed = range(len(case.positions)) if case.page is None else [p for p in case.page.tolist() if p >= 0]
    others = [n for n in range(len(want)) if n not in listed]
    raw = {2: torch.int16, 4: torch.int32}[case.pool.element_size()]
    assert torch.equal(after.pool[others].view(raw), case.pool[others].view(raw))
    rounding = torch.finfo(case.pool.dtype).eps / 2
    largest = want.abs().max().item()
    error = (after.pool.double() - want).abs()
    budget = want.abs() * rounding + 8 * torch.finfo(torch.float32).eps * largest
    assert (error <= budget).all(), f"largest excess {(error - budget).max().item():.3g}, largest key {largest:.3g}"
