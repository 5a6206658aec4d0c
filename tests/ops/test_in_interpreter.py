"""Runs tests that interpret kernels, each file in a process of its own: those of ``tests/ops/interpreter``, and those
of other files that are marked so (see ``tests/support/places.py``)."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, python_path
from tests.support.zygote import Zygote

pytestmark = pytest.mark.kernels

FOLDER = Path(__file__).parent
TIMEOUT = 1800.0  # seconds of a file


def interprets(path: Path) -> bool:
    return path.parent != FOLDER or "\nfrom tests.support.places import" in path.read_text()


FILES = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in (*FOLDER.glob("test_*.py"), *FOLDER.glob("interpreter/test_*.py"))
    if interprets(path)
)


@pytest.mark.parametrize("name", FILES)
def test_in_interpreter(name: str) -> None:
    run_in_interpreter(name, "not slow")


@pytest.mark.slow
def test_8192_tokens_in_interpreter() -> None:
    run_in_interpreter("test_delta_rule_paged.py", "slow")


def run_in_interpreter(name: str, marker: str) -> None:
    options = ["-q", "--color=no", "-p", "no:cacheprovider", "-m", marker]
    command = ["-m", "pytest", *options, str(FOLDER / name)]
    run = zygote().run(command, environment(), TIMEOUT)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0, f"no test ran:\n{run.stdout}"


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
    }


@functools.cache
def zygote() -> Zygote:
    """A process that has imported what all files need, and none of the kernels."""
    return Zygote(("torch", "triton", "pytest", "hypothesis"), environment(), ROOT)
