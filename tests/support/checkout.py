"""Which sources the tests run: those of this checkout, in every process that they start."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (str(ROOT), str(ROOT / "integrations"))

SAID = re.compile(r"mem_triton \S+ from (/\S+) and (/\S+)")
"""How an engine's worker names the sources that it runs; ``mem_triton.compat.installation``."""


def python_path(*before: str | Path) -> str:
    """PYTHONPATH of a process that a test starts: ``before``, the checkout, then whatever was there."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*map(str, before), *SOURCES, *filter(None, given)]))


def prefer() -> None:
    """Let this process and those that it starts import the checkout, whatever is installed."""
    os.environ["PYTHONPATH"] = python_path()
    sys.path[:] = dict.fromkeys([*SOURCES, *sys.path])


def check_sources(output: str, needed: bool) -> None:
    """Raise AssertionError if an engine with memory that printed ``output`` ran other sources than the checkout's.

    needed: it must have named them.
    """
    named = {path for paths in SAID.findall(output) for path in paths}
    elsewhere = sorted(path for path in named if not Path(path).is_relative_to(ROOT))
    assert not elsewhere, f"the engine ran {', '.join(elsewhere)} instead of the checkout {ROOT}"
    assert named or not needed, f"no worker said which mem_triton it runs:\n{output[-3000:]}"
