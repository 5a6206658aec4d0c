"""Holds the numbers that checksums are made of, for the code that torch runs and the code that numba compiles."""

from __future__ import annotations

import numpy as np

BLOCK = 64
"""Words of 8 bytes that are added up before they are weighed; that is what makes it as cheap as reading."""
MIX = np.uint64(0x9E3779B97F4A7C15)
