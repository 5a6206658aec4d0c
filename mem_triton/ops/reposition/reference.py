"""Keys to and from their positions, in plain torch: the specification of the kernel, and what a CPU runs.

A query-key product after RoPE depends on the difference of their positions alone. So a text may be encoded once, kept
before RoPE, and read at any place, negative positions included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem_triton.ops.reposition.rope import RotaryEmbedding


def rotate(x: Tensor, positions: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Turn keys (or queries) from before RoPE to their positions (arXiv 2104.09864, section 3.2.2).

    x: [..., T, D] of any float dtype, D >= rope.rotary_dim. positions: integers, broadcastable to [..., T], of any
    sign. Returns the shape and dtype of ``x``. Angles are fp64, the products fp32 (fp64 for fp64 ``x``). Example::

        keys = rotate(block.keys[0], block.positions[0] - 128, rope)  # Memory³: a reference before the context
    """
    return _turn(x, positions, rope, 1)


def unrotate(x: Tensor, positions: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Invert ``rotate``: from a key as the engine caches it to the key before RoPE. Same arguments."""
    return _turn(x, positions, rope, -1)


def move(x: Tensor, old: Tensor, new: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Rotate keys from positions ``old`` to ``new`` in one turn, which is rounded once. Shapes as for ``rotate``."""
    return _turn(x, new.to(torch.int64) - old.to(torch.int64), rope, 0)


def angles(positions: Tensor, rope: RotaryEmbedding, dtype: torch.dtype, power: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [..., rotary_dim / 2] in ``dtype``, of positions [...] of an integer dtype.

    power: 1 puts YaRN's factor on, -1 takes it off and turns back, 0 leaves it as it is. Each distinct position of many
    is computed once.
    """
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions: {positions.dtype}, expected integers")
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=positions.device)
    factor, where = rope.attention_factor**power, None
    if positions.device.type == "cpu" and positions.numel() > 1:
        first, last = positions.aminmax()
        if (span := int(last) - int(first) + 1) < positions.numel():
            where, positions = (positions - first).long(), torch.arange(span) + first
    angle = positions.unsqueeze(-1) * inv_freq * (-1 if power < 0 else 1)
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return (cos, sin) if where is None else (cos[where], sin[where])


def turn(x: Tensor, cos: Tensor, sin: Tensor, rope: RotaryEmbedding) -> Tensor:
    """Turn x, [..., D], by angles of ``angles``, in their dtype. Returns the shape and dtype of ``x``."""
    if rope.rotary_dim == 0:
        return x
    turning = x[..., : rope.rotary_dim].to(cos.dtype)
    if rope.interleaved:
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = turning.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), x[..., rope.rotary_dim :]), -1)


def _turn(x: Tensor, positions: Tensor, rope: RotaryEmbedding, power: int) -> Tensor:
    if rope.rotary_dim == 0:
        return x
    if x.shape[-1] < rope.rotary_dim:
        raise ValueError(f"x: {x.shape[-1]} channels, the rotary embedding turns {rope.rotary_dim}")
    wide = torch.promote_types(x.dtype, torch.float32)
    return turn(x, *angles(positions.to(x.device), rope, wide, power), rope)
