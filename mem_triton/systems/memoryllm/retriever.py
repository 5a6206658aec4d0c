"""M+'s retriever (arXiv 2502.00592, section 3.2.2): what a layer's normed rows ask for, and what they are found by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.systems.memoryllm.records import PoolError

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
PREFIX = "retriever."
"""Of its matrices beside a store's pools: ``retriever.3.query.0``, of layer 3, and ``.1`` where there are two."""


def matrix_name(layer: int, kind: str, index: int) -> str:
    """Of one matrix beside a store's pools. kind: "query", "key" or "encoder_query"."""
    return f"{PREFIX}{layer}.{kind}.{index}"


class RowRetriever:
    """Made of what lies beside a store's pools. Raises PoolError naming what is missing.

    Example::

        queries = retriever.queries(layer, normed)       # [T, K] of the layer's normed input rows [T, d]
        scores_of(queries, [keys])
    """

    def __init__(
        self, weights: Mapping[str, Tensor], layers: int, act: str, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if act not in ACTIVATIONS:
            raise PoolError(f"hidden_act is {act!r}, and a retriever has one of {', '.join(ACTIVATIONS)}")
        self._act = ACTIVATIONS[act]
        self._matrices: dict[tuple[int, str], list[Tensor]] = {}
        for layer in range(layers):
            for kind in ("query", "key"):
                names = [matrix_name(layer, kind, index) for index in range(2)]
                if names[0] not in weights:
                    raise PoolError(f"the store's weights have no {names[0]}; convert the checkpoint again")
                found = [weights[name].to(device, dtype) for name in names if name in weights]
                self._matrices[layer, kind] = found

    def queries(self, layer: int, normed: Tensor) -> Tensor:
        """[T, K] of a prompt's rows [T, d] behind the layer's first norm."""
        return self._through(self._matrices[layer, "query"], normed)

    def keys(self, layer: int, normed: Tensor) -> Tensor:
        """[n, K] of rows [n, d] behind the layer's first norm."""
        return self._through(self._matrices[layer, "key"], normed)

    def _through(self, matrices: list[Tensor], x: Tensor) -> Tensor:
        x = F.linear(x, matrices[0])
        return F.linear(self._act(x), matrices[1]) if len(matrices) > 1 else x
