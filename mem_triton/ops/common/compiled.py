"""How numba compiles loops here. This module imports no numba, which an engine's start trips over."""

from __future__ import annotations

# Sums may be reordered, for vector instructions: always in the same way. Infinities and NaN keep their meaning.
OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
