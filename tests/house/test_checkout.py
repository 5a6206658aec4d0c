"""Tests run the checkout: in this process, in what they start, and in the workers of engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mem_triton
from mem_triton.compat import installation
from tests.sglang_engine.engine import environment as sglang
from tests.support import checkout
from tests.vllm_engine.engine import environment as vllm

PACKAGES = ("mem_triton", "mem_triton_vllm", "mem_triton_sglang", "mem_triton_transformers")
ENVIRONMENTS = {"vllm_v1": vllm, "vllm_v2": lambda: vllm("v2"), "sglang": sglang}
WHERE = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {PACKAGES}), sep='\\n')"


@pytest.mark.parametrize("engine", ENVIRONMENTS)
def test_fault29_what_tests_start_imports_the_checkout(tmp_path, monkeypatch, engine):
    """Also where another mem_triton is installed, or named by the caller's PYTHONPATH."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()

    def found(env: dict[str, str]) -> list[Path]:
        said = subprocess.check_output([sys.executable, "-S", "-c", WHERE], env=env, cwd=tmp_path.parent, text=True)
        return [Path(line) for line in said.split()]

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert all(path.is_relative_to(tmp_path) for path in found(dict(os.environ)))  # control: the other one is found
    assert all(path.is_relative_to(checkout.ROOT) for path in found(ENVIRONMENTS[engine]()))


def test_fault29_this_process_imports_the_checkout():
    assert Path(mem_triton.__file__).is_relative_to(checkout.ROOT)
    said = installation(str(checkout.ROOT / "integrations" / "mem_triton_vllm" / "loader.py"))
    checkout.check_sources(f"INFO [loader.py] {said}", needed=True)


def test_fault29_an_engine_that_ran_other_sources_is_found():
    """Every engine with memory that a test starts is checked so; its worker names its sources."""
    ours, other = f"{checkout.ROOT}/mem_triton", "/site-packages/mem_triton"
    for output in (f"mem_triton 0.1.0 from {other} and {ours}", f"mem_triton 0.1.0 from {ours} and {other}_vllm"):
        with pytest.raises(AssertionError, match=f"ran {other}.* instead of the checkout"):
            checkout.check_sources(f"INFO {output}", needed=False)
    with pytest.raises(AssertionError, match="no worker said"):
        checkout.check_sources("INFO nothing", needed=True)
