"""Names by which users and vLLM know this integration."""

from __future__ import annotations

LOAD_FORMAT = "mem_triton"
"""Of ``--load-format``."""
