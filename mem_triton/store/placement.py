"""Where memory lies on the line of positions: before the context, which starts at 0 where the engine puts it.

RoPE is relative, so keys rotated to negative positions are read as text that came earlier, and the engine need not
know. Memory³'s references lie side by side in one interval (parallel positions, arXiv 2407.01178 §3.1); a prefix ends
at -1; the constant prefix of a bank ("sink") lies before all references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mem_triton.ops.reposition import RotaryEmbedding, rotate
from mem_triton.store.block import MemoryBlock

Kind = Literal["memory3", "prefix"]


def place(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], kind: Kind, reference_tokens: int) -> MemoryBlock:
    """The block with its keys rotated, and its positions, where it is read.

    ropes: one a layer of the block. Token j of a "memory3" reference goes to j - reference_tokens, token j of a
    "prefix" of T tokens to j - T.
    """
    return _moved(block, ropes, -(reference_tokens if kind == "memory3" else block.tokens))


def place_sink(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], reference_tokens: int) -> MemoryBlock:
    """The constant prefix of p tokens at -(reference_tokens + p) ... -(reference_tokens + 1)."""
    return _moved(block, ropes, -(reference_tokens + block.tokens))


def _moved(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], offset: int) -> MemoryBlock:
    positions = block.positions + offset  # [L, Hkv, T]
    keys = [rotate(k, p, rope) for k, p, rope in zip(block.keys, positions, ropes, strict=True)]
    return MemoryBlock(torch.stack(keys) if keys else block.keys, block.values, positions)
