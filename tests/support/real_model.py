"""The real model of ``mem-triton model smollm2``, made once for all tests of a checkout."""

from __future__ import annotations

from pathlib import Path

from mem_triton.cli.model import make
from tests.support.checkout import ROOT


def smollm2(dtype: str = "float32") -> Path:
    """Its folder; half a minute the first time, nothing later."""
    folder = ROOT / ".cache" / f"smollm2-{dtype}"
    make("smollm2", folder, dtype)
    return folder
