"""The notebook's cells, run one after the other in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.checkout import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "documents.ipynb"


def code() -> str:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    compile(code(), str(NOTEBOOK), "exec")


@pytest.mark.engine
@pytest.mark.real
def test_it_runs():
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code()], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("by name") == 2 and "ferry" in done.stdout
