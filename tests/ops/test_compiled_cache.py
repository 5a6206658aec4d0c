"""What numba keeps of compiled functions is not older than the sources, also of functions that were inlined."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mem_triton.ops.common.compiled import drop_stale

_INNER = "from numba import njit\n@njit(cache=True)\ndef inner(x):\n    return x + {step}\n"
_OUTER = "from numba import njit\nfrom inner import inner\n@njit(cache=True)\ndef outer(x):\n    return inner(x)\n"


def test_an_edit_of_an_inlined_function_is_seen(tmp_path):
    (tmp_path / "outer.py").write_text(_OUTER)
    inner = tmp_path / "inner.py"
    inner.write_text(_INNER.format(step=1))
    assert _run(tmp_path) == "2"
    assert drop_stale([tmp_path]) == 0, "what is fresh is kept"
    inner.write_text(_INNER.format(step=2))
    later = time.time() + 5  # also on a file system that counts whole seconds
    os.utime(inner, (later, later))
    assert _run(tmp_path) == "2", "numba itself sees the edit now: drop_stale has had its day"
    assert drop_stale([tmp_path]) > 0
    assert _run(tmp_path) == "3"


def test_a_folder_that_is_gone_stops_nothing(tmp_path):
    assert drop_stale([tmp_path / "nowhere"]) == 0


def _run(folder: Path) -> str:
    program = "from outer import outer; print(outer(1))"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()
