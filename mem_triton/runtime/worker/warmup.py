"""Lists batches that make every kernel compile before the first request: each brings out another launch.

All rows of such a batch are padding: a kernel is compiled and launched, finds nothing to do and touches nothing. So the
very layers, caches and tables of the engine can be used, with the strides and alignments that serving will have.
What a launch is specialised on follows from three numbers; the lists below hold both sides of every border.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BORDERS = (16, 32, 64, 4096)
"""Rows of queries x query heads of a KV head, up to which the tables choose one tile and above which another."""
CHUNKS = (64, 128, 256)
"""Tokens up to which the delta rule walks a row in one launch, by rank."""


class Batch(NamedTuple):
    """tokens: in all, padding included. rows: of the batch. longest: queries of its longest row."""

    tokens: int
    rows: int
    longest: int


class Padding(NamedTuple):
    """Holds the tables of a batch without requests; int32."""

    query_start_loc: Tensor  # [rows + 1]
    seq_lens: Tensor  # [rows]
    block_table: Tensor  # [rows, width]


def padding(rows: int, width: int, device: torch.device) -> Padding:
    """Make the tables of ``rows`` rows of padding. width: of the block table."""
    shapes = (rows + 1,), (rows,), (rows, width)
    return Padding(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


def batches(group: int, max_rows: int, max_tokens: int) -> list[Batch]:
    """What one engine's steps can look like to our kernels. group: query heads that share a KV head.

    max_rows, max_tokens: the most that a step of this engine holds.
    """
    borders = {n for border in BORDERS for n in (border // group, border // group + 1)}
    lengths = sorted(n for n in borders | {1, 2, max_tokens} | {c + 1 for c in CHUNKS} if 1 <= n <= max_tokens)
    sizes = sorted(n for n in borders | {1, max_tokens} if 1 <= n <= max_tokens)
    counts = [1 << i for i in range(max_rows.bit_length()) if 1 << i < max_rows] + [max_rows]
    return [
        Batch(max(tokens, longest), rows, longest)
        for longest in lengths
        for rows in counts
        for tokens in sorted({longest, min(rows * longest, max_tokens), *(n for n in sizes if n > longest)})
    ]
