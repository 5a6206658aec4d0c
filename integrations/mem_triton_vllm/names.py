"""Defines the names that users and vLLM have for this integration."""

from __future__ import annotations

LOAD_FORMAT = "mem_triton"
"""Of ``--load-format``."""
