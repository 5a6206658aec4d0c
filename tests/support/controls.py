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
        resident = next(r for r in self._residents.values() if r.lease == lease)
        last, states = resident.last_position, self.last[:, resident.slot]
    return position, states[:, last % 2].clone()


def no_pins() -> None:
    """Pages of running requests may be taken from them."""
    from mem_triton.store.pool.ledger import PageLedger

    PageLedger._may_go = staticmethod(lambda entry: entry.ready)
