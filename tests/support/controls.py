"""Negative controls of what engines share: each switches one safety mechanism off, in the process that calls it."""

from __future__ import annotations

from typing import Any


def one_last_state_only() -> None:
    """Workers keep nothing but the newest state of a request."""
    from mem_triton.systems.delta_mem import slots

    slots.StateSlots.pick = _pick_newest


def _pick_newest(self: Any, lease: str, position: int) -> tuple[int, Any]:
    if lease in self._left:
        last, states = self._left.pop(lease)
    else:
        running = next(r for r in self._requests.values() if r.lease == lease)
        last, states = running.last_position, self.last[:, running.slot]
    return position, states[:, last % 2].clone()


def no_pins() -> None:
    """Pages of running requests may be taken from them, and filled while they are read."""
    from mem_triton.store.pool.ledger import PageLedger
    from mem_triton.store.pool.tables import MemoryTables

    PageLedger._may_go = staticmethod(lambda entry: entry.ready)
    MemoryTables.readers = lambda self, pages: []  # else a load waits for them, where it comes late enough


def pools_read_with_the_writing_adapter() -> None:
    """A pool's keys and values are made by the weights that write."""
    from mem_triton.systems.memoryllm.worker import PoolWorker

    stock = PoolWorker._keys_and_values

    def keys_and_values(self: Any, layer: int, rows: Any) -> Any:
        plain, adapter = self._io._queries_keys_values, self._factors[layer]
        self._io._queries_keys_values = lambda module, x, _: plain(module, x, adapter)
        try:
            return stock(self, layer, rows)
        finally:
            del self._io._queries_keys_values

    PoolWorker._keys_and_values = keys_and_values
