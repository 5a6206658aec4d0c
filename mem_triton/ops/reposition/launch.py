"""Launches the reposition kernel: grid and static configuration. Works on whatever the tensors lie on."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mem_triton.ops.reposition.kernels import reposition_kernel
from mem_triton.ops.reposition.rope import RotaryEmbedding

ELEMENTS = 1024  # of the [tokens, pairs] tile of a program: 8 a thread, which leaves room for their fp64 angles
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=256)
def quarter_turns(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    """fp64 [max(pairs, 1)] on the device; made once per model and device, so that a captured graph can hold it."""
    return torch.tensor([f / (math.pi / 2) for f in inv_freq] or [0.0], dtype=torch.float64, device=device)


def constants(page_size: int, head_dim: int, rotary_dim: int, interleaved: bool) -> dict[str, int]:
    """The kernel's compile-time arguments that a page layout and a model fix."""
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    pairs = 1 << max(half - 1, 0).bit_length()
    return {
        "PAGE_SIZE": page_size,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "TOKENS": min(1 << (page_size - 1).bit_length(), max(ELEMENTS // pairs, 1)),
        "PAIRS": pairs,
        "REST": 1 << (rest - 1).bit_length() if rest else 0,
    }


def move_pages(
    pool: Tensor,
    positions: Tensor,
    page: Tensor | None,
    source: Tensor,
    source_page: Tensor | None,
    old_positions: Tensor | None,
    rope: RotaryEmbedding,
) -> None:
    """One launch over the listed pages. Arguments as in ``op.reposition_pages``; the grid depends on shapes alone."""
    listed, heads, page_size = positions.shape
    if positions.numel() == 0:
        return
    fixed = constants(page_size, pool.shape[3], rope.rotary_dim, rope.interleaved)
    grid = (listed, heads, -(-page_size // fixed["TOKENS"]))
    reposition_kernel[grid](
        pool,
        positions,
        page,
        source,
        source_page,
        old_positions,
        quarter_turns(rope.inv_freq, pool.device),
        rope.attention_factor if old_positions is None else 1.0,
        *pool.stride()[:3],
        *source.stride()[:3],
        *positions.stride()[:2],
        **fixed,
        **OPTIONS,
    )
