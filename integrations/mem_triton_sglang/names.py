"""Defines the names that users and SGLang have for this integration."""

from __future__ import annotations

BACKEND = "mem_triton"
"""Of ``--attention-backend``."""
VARIABLE = "MEM_TRITON_CONFIG"
"""Environment variable that names the configuration file."""
