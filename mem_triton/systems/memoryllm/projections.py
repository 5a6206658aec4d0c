"""Keys before RoPE and values of a version's rows, and of the version after it: survivors keep theirs.

Rows are projected in blocks of one size, so that a row's numbers do not depend on how many go together with it. Keys
are turned to their positions from what they are before RoPE, and never from where they were in an earlier version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from mem_triton.systems.base import Adapter, LayerIO
from mem_triton.systems.memoryllm.update import UpdateStep

Projected = tuple[Tensor, Tensor]
"""Keys and values of one layer, [Hkv, rows, D] each, the learned first row in front."""


class Projections:
    """io: the model's layers. bos: [L, 1, d], None for pools without; block: rows that are projected together.

    reading: what is added to the served weights where a pool is read, by layer.

    Example::

        one = projections.whole(layer, rows)              # of main@1
        two = projections.after(layer, one, delta.steps)  # of main@2: to the bit what ``whole`` gives for its rows
    """

    def __init__(
        self,
        io: LayerIO,
        bos: Tensor | None,
        block: int,
        device: torch.device,
        dtype: torch.dtype,
        reading: Mapping[int, Adapter] = MappingProxyType({}),
    ) -> None:
        self._io, self._bos, self._block, self._device, self._dtype = io, bos, block, device, dtype
        self._reading = reading

    def whole(self, layer: int, rows: Tensor) -> Projected:
        """Of all rows [N, d] of a version."""
        found = [self.rows(layer, rows)]
        if self._bos is not None:
            found.insert(0, self.rows(layer, self._bos[layer]))
        return _joined(found)

    def after(
        self, layer: int, before: Projected, steps: Sequence[UpdateStep], gone: list[Projected] | None = None
    ) -> Projected:
        """Of the version that steps make of ``before``, which may lie on the host. gone: gets what each step drops."""
        first = 0 if self._bos is None else 1
        keys, values = (part.to(self._device) for part in before)
        for step in steps:
            kept, dropped = torch.ones(keys.shape[1], dtype=torch.bool), step.dropped[layer % len(step.dropped)].long()
            kept[dropped + first] = False
            if gone is not None:
                gone.append(tuple(part[:, (dropped + first).to(self._device)] for part in (keys, values)))
            index = kept.nonzero()[:, 0].to(self._device)
            survivors = keys.index_select(1, index), values.index_select(1, index)
            keys, values = _joined([survivors, self.rows(layer, step.delta[layer])])
        return keys, values

    def rows(self, layer: int, rows: Tensor) -> Projected:
        """Of any rows [n, d]."""
        rows = rows.to(self._device, self._dtype, non_blocking=True)
        count, found = len(rows), []
        rows = F.pad(rows, (0, 0, 0, -count % self._block))
        for part in rows.split(self._block):
            found.append(self._io.project(layer, part, self._reading.get(layer, {})))
        keys, values = _joined(found)
        return keys[:, :count], values[:, :count]


def _joined(parts: Sequence[Projected]) -> Projected:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)
