"""Keys before RoPE and values of pools on a worker's host: what had to leave the device comes back without the model.

Of each pool the newest version that was placed is kept; the next one is made of it, too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mem_triton.systems.memoryllm.long_term import LongTerm
from mem_triton.systems.memoryllm.projections import Projected


@dataclass(frozen=True)
class HeldVersion:
    """made: keys before RoPE and values of a version, by layer, on the host. long: of M+."""

    version: int
    made: Mapping[int, Projected]
    long: LongTerm | None = None

    @property
    def bytes(self) -> int:
        """What it takes, long-term rows included, wherever their tier is."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for part in self.made.values():
            yield from part
        for rows in () if self.long is None else (*self.long.merged, *self.long.fresh):
            for part in rows:
                yield from (*part.content, part.keys)


class HostTier:
    """Versions by their pool's identity, the least recently read ones go first. room: bytes; one always stays.

    Thread-safe.
    """

    def __init__(self, room: int) -> None:
        self._room, self._lock = room, threading.Lock()
        self._held: OrderedDict[str, HeldVersion] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, identity: str) -> HeldVersion | None:
        """What is held of a pool, which somebody reads now."""
        with self._lock:
            if identity in self._held:
                self._held.move_to_end(identity)
            return self._held.get(identity)

    def keep(self, identity: str, held: HeldVersion) -> None:
        """Hold a version, unless a newer one is held."""
        with self._lock:
            before = self._held.get(identity)
            if before is None or before.version < held.version:
                self._held[identity] = held
            self._held.move_to_end(identity)
            sizes = {name: one.bytes for name, one in self._held.items()}
            while len(self._held) > 1 and sum(sizes[name] for name in self._held) > self._room:
                self._held.popitem(last=False)

    def clear(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()
