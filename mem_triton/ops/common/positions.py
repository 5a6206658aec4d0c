"""Query positions, as tables of memory and kernels count them: int32."""

from __future__ import annotations

FOREVER = 2**31 - 1
"""``end`` of a segment that every later query position sees."""
