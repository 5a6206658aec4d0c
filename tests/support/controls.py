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


def rows_stand_unordered() -> None:
    """Long-term rows stand before the pool as they lie, and not by their age."""
    from mem_triton.systems.memoryllm import long_term

    stock = long_term.pick
    long_term.pick = lambda *arguments: stock(*arguments).sort()[0]


def prompts_choose_by_their_first_token() -> None:
    """A prompt's other tokens do not ask for long-term rows."""
    from mem_triton.systems.memoryllm.choosing import RowChooser

    stock = RowChooser._choose
    RowChooser._choose = lambda self, layer, reader, normed: stock(self, layer, reader, normed[:1])


def stock_frequencies() -> None:
    """The engine's rotary tables stay as they are."""
    from mem_triton.runtime.worker import rotary

    rotary.listed_tables = lambda model, config: iter(())
