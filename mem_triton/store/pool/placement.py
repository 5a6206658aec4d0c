"""Places memory before the context, which starts at position 0 where the engine puts it.

RoPE is relative, so keys rotated to negative positions are read as text that came earlier, and the engine need not
know. Memory³'s references lie side by side in one interval (parallel positions, arXiv 2407.01178, section 3); a prefix
ends at -1; the constant prefix of a bank ("sink") lies before all references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mem_triton.ops.reposition import RotaryEmbedding, angles, turn
from mem_triton.store.block import MemoryBlock

Kind = Literal["memory3", "prefix", "parallel"]
CHUNK_BYTES = 1 << 21
"""Keys in fp32 that are turned together: with what is made of them they stay in a processor's cache."""


def place(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], kind: Kind, reference_tokens: int) -> MemoryBlock:
    """The block with its keys rotated, and its positions, where it is read.

    ropes: one a layer of the block. Token j of a "memory3" reference goes to j - reference_tokens, token j of a
    "prefix" or "parallel" entry of T tokens to j - T.
    """
    return _moved(block, ropes, -(reference_tokens if kind == "memory3" else block.tokens))


def place_sink(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], reference_tokens: int) -> MemoryBlock:
    """The constant prefix of p tokens at -(reference_tokens + p) ... -(reference_tokens + 1)."""
    return _moved(block, ropes, -(reference_tokens + block.tokens))


def tempered(block: MemoryBlock, temperature: float) -> MemoryBlock:
    """The block as attention at ``temperature`` reads it: logits are linear in the keys, so these are divided by it."""
    return block if temperature == 1 else MemoryBlock(block.keys / temperature, block.values, block.positions)


def _moved(block: MemoryBlock, ropes: Sequence[RotaryEmbedding], offset: int) -> MemoryBlock:
    if len(ropes) != len(block.keys):
        raise ValueError(f"ropes: {len(ropes)} for a block of {len(block.keys)} layers")
    positions = block.positions + offset  # [L, Hkv, T]
    dense = block.tokens > 0 and bool((positions == positions[:1, :1]).all())  # in all heads: one set of angles
    keys = torch.empty_like(block.keys)
    wide = torch.promote_types(keys.dtype, torch.float32)
    step = max(1, CHUNK_BYTES // max(1, wide.itemsize * keys[:1].numel()))
    for rope in set(ropes):
        alike = [i for i, other in enumerate(ropes) if other == rope]
        cos_sin = angles(positions[0, 0], rope, wide) if dense else None
        for i in range(0, len(alike), step):
            layers: list[int] | slice = alike[i : i + step]
            if layers[-1] - layers[0] == len(layers) - 1:
                layers = slice(layers[0], layers[-1] + 1)  # no copy
            cos, sin = cos_sin or angles(positions[layers], rope, wide)
            keys[layers] = turn(block.keys[layers], cos, sin, rope)
    return MemoryBlock(keys, block.values, positions)
