"""Which sources the tests run: those of this checkout, in every process that they start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (str(ROOT), str(ROOT / "integrations"))


def python_path(*before: str | Path) -> str:
    """PYTHONPATH of a process that a test starts: ``before``, the checkout, then whatever was there."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*map(str, before), *SOURCES, *filter(None, given)]))


def prefer() -> None:
    """Let this process and those that it starts import the checkout, whatever is installed."""
    os.environ["PYTHONPATH"] = python_path()
    sys.path[:] = dict.fromkeys([*SOURCES, *sys.path])
