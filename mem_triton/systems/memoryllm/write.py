"""Write a text into a pool: a plain causal pass of every decoder layer (MemoryLLM, arXiv 2402.04624, section 3.1.2).

A layer reads ``[bos | last k rows of its pool | text]``, with the positional embedding of new rows added to the last k;
the last k rows of what it gives are the new rows, and the text's go on to the next layer. That is a plain causal layer,
since keys and values of a prefix do not depend on attention in the same layer, and each layer takes its own anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]
"""A decoder layer, causal: hidden rows [T, d] at positions 0...T-1 to what it gives for them."""


@dataclass(frozen=True)
class WriteWeights:
    """What writing needs besides the layers. bos: [L, 1, d] or None; new_rows: [d]."""

    bos: Tensor | None
    new_rows: Tensor


def write_pass(
    hidden: Tensor,
    layers: Sequence[Layer],
    weights: WriteWeights,
    tail: Tensor | None,
    rows: int,
    embedding_first: bool = True,
) -> Tensor:
    """The new rows [L, n, d] of a text. hidden: its input embeddings [T, d]; tail: [L, rows, d], None for no pool yet.

    rows: how many a write makes; a shorter text makes fewer for a pool that has none yet. embedding_first: whether such
    a first write adds the embedding. The authors' code then keeps, of every layer but the last, a view that the next
    layer adds the embedding to, so that their first rows have it in them once more; these have it as well.
    """
    found = []
    for index, layer in enumerate(layers):
        read = [hidden]
        if tail is not None:
            read = [
                *([weights.bos[index].to(hidden)] if weights.bos is not None else []),
                tail[index].to(hidden),
                hidden,
            ]
        given = torch.cat(read)
        adds = tail is not None or embedding_first
        if adds:
            given[-rows:] += weights.new_rows.to(hidden)
        output = layer(given)
        new = output[-rows:].clone()
        hidden = output[-len(hidden) :]
        if tail is None and adds and index + 1 < len(layers):
            new += weights.new_rows.to(hidden)
        found.append(new)
    return torch.stack(found)
