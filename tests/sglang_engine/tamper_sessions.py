"""Negative controls of sessions: each switches one safety mechanism off, in every process of an engine."""

from __future__ import annotations


def one_last_state_only() -> None:
    """Workers keep nothing but the newest state of a request."""
    from mem_triton.runtime import slots

    slots.StateSlots.pick = _pick_newest


def _pick_newest(self, lease: str, position: int):
    if lease in self._left:
        last, states = self._left.pop(lease)
    else:
        resident = next(r for r in self._residents.values() if r.lease == lease)
        last, states = resident.last_position, self.last[:, resident.slot]
    return position, states[:, last % 2].clone()
