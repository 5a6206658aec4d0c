"""Static launch configurations, one table per op, keyed by GPU architecture. Nothing is tuned while serving."""

from __future__ import annotations

MEASURED: dict[tuple[str, str], str] = {}
"""(op, architecture) -> result file of the measurement that the entry was chosen by. Empty: no GPU was at hand yet."""
