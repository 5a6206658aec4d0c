"""KV-cache blocks whose elements an engine's CPU kernels keep in an order of their own.

vLLM's attention on a CPU writes a block of N tokens and D channels as N * D keys, then N * D values, in an order that
its instruction set wants (https://github.com/vllm-project/vllm, ``csrc/cpu/cpu_attn_*.hpp``):

* ``columns`` (any vector unit): keys by channel [D, N], values by token [N, D];
* ``pairs`` (AMX): what VNNI instructions load. Keys [N / 16, D / 2, 16 tokens, 2 channels], values
  [D / 16, N / 2, 16 channels, 2 tokens].

Any other order is learned from what the engine's own kernel writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16


class Packing(NamedTuple):
    """How a block lies. tokens: N. keys, values: of the kind "other", int64 [N * D], where token n's channel d lies."""

    kind: str
    tokens: int
    keys: Tensor | None = None
    values: Tensor | None = None


def unpack_keys(packed: Tensor, packing: Packing) -> Tensor:
    """[..., N * D] as [..., N, D]: a view or a copy."""
    if packing.kind == "columns":
        return packed.unflatten(-1, (-1, packing.tokens)).mT
    if packing.kind == "pairs":
        groups = packed.unflatten(-1, (packing.tokens // LANES, -1, LANES, 2)).transpose(-3, -2)
        return groups.flatten(-2).flatten(-3, -2)
    return _reorder(packed, packing.keys, packing.tokens)


def unpack_values(packed: Tensor, packing: Packing) -> Tensor:
    """[..., N * D] as [..., N, D]: a view or a copy."""
    if packing.kind == "columns":
        return packed.unflatten(-1, (packing.tokens, -1))
    if packing.kind == "pairs":
        groups = packed.unflatten(-1, (-1, packing.tokens // 2, LANES, 2)).movedim(-4, -2)  # [.., N/2, 16, D/16, 2]
        return groups.movedim(-1, -3).transpose(-2, -1).flatten(-2).flatten(-3, -2)
    return _reorder(packed, packing.values, packing.tokens)


def learn(write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens: int, heads: int, size: int) -> Packing:
    """The packing of what ``write`` does: keys and values [N, H, D] in fp32 to [H, N * D] each, as they lie.

    It may round to bf16, fp16 or anything else that holds whole numbers to 128. Raises ValueError if what it writes is
    no reordering of a block's elements, the same for all heads.
    """
    order = torch.arange(tokens * size)
    digits = [order // 128**i % 128 for i in range(3)]
    keys, values = (
        torch.zeros(heads, tokens * size, dtype=torch.int64),
        torch.zeros(heads, tokens * size, dtype=torch.int64),
    )
    for i, digit in enumerate(digits):
        block = digit.view(tokens, 1, size).expand(-1, heads, -1).float()
        for found, written in zip((keys, values), write(block, block), strict=True):
            found += written.to(torch.int64) * 128**i
    for name, found in (("keys", keys), ("values", values)):
        if not torch.equal(found[0].sort().values, order) or not (found == found[0]).all():
            raise ValueError(f"the {name} of a KV-cache block are not what was written to it, in any order")
    places = [torch.empty_like(order).scatter_(0, found[0], order) for found in (keys, values)]
    for kind in ("columns", "pairs"):
        if kind == "pairs" and (tokens % LANES or size % LANES):
            continue
        known = Packing(kind, tokens)
        if torch.equal(unpack_keys(keys[0], known).flatten(), order) and torch.equal(
            unpack_values(values[0], known).flatten(), order
        ):
            return known
    return Packing("other", tokens, *places)


def _reorder(packed: Tensor, places: Tensor, tokens: int) -> Tensor:
    return packed[..., places].unflatten(-1, (tokens, -1))
