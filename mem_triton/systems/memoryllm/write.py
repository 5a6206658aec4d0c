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


class WritePass:
    """A pass that can stop after any layer. hidden: the text's rows [T, d] before layer ``first``; see ``write_pass``.

    Where layers are split into stages, each has a pass of its own, which goes on with the rows of the one before.

    Example::

        write = WritePass(hidden, weights, tail, rows=256)
        for layer in layers:
            write.advance(layer)
        write.new()                                 # [L, n, d]
    """

    def __init__(
        self,
        hidden: Tensor,
        weights: WriteWeights,
        tail: Tensor | None,
        rows: int,
        embedding_first: bool = True,
        first: int = 0,
    ) -> None:
        self.hidden, self._weights, self._tail, self._rows, self._first = hidden, weights, tail, rows, first
        self._adds = tail is not None or embedding_first
        self._found: list[Tensor] = []

    @property
    def done(self) -> int:
        """Layers that it has been through."""
        return len(self._found)

    def advance(self, layer: Layer) -> None:
        """Go through the next layer."""
        hidden, weights, index = self.hidden, self._weights, len(self._found)
        read = [hidden]
        if self._tail is not None:
            read = [
                *([weights.bos[self._first + index].to(hidden)] if weights.bos is not None else []),
                self._tail[index].to(hidden),
                hidden,
            ]
        given = torch.cat(read)
        if self._adds:
            given[-self._rows :] += weights.new_rows.to(hidden)
        output = layer(given)
        self._found.append(output[-self._rows :].clone())
        self.hidden = output[-len(hidden) :]

    def new(self, last: bool = True) -> Tensor:
        """The new rows [L, n, d], once it has been through its layers. last: the model's last one is among them."""
        new = torch.stack(self._found)
        if self._tail is None and self._adds:
            new[: len(new) - last] += self._weights.new_rows.to(new)
        return new


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
    write = WritePass(hidden, weights, tail, rows, embedding_first)
    for layer in layers:
        write.advance(layer)
    return write.new()
