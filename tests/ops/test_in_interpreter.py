"""Runs ``tests/ops/interpreter`` under Triton's interpreter, each file in a fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_in_interpreter(name: str) -> None:
    run_in_interpreter(name, "not slow")


@pytest.mark.slow
def test_8192_tokens_in_interpreter() -> None:
    run_in_interpreter("test_delta_rule_kernels.py", "slow")


def run_in_interpreter(name: str, marker: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-q", "--color=no", "-p", "no:cacheprovider", "-m", marker]
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER / name)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0, f"no test ran:\n{run.stdout}"
