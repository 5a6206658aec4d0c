"""Our own code raises inside a running vLLM: the engine lives on, and nobody gets a wrong answer."""

from __future__ import annotations

import pytest

from tests.support import fault_scenarios as scenarios
from tests.support.faults import VLLM
from tests.vllm_engine.engine import run_engine

pytestmark = pytest.mark.engine


def test_fault01_no_exception_of_ours_ends_an_engine(memory_bench, bench, tmp_path):
    scenarios.no_exception_of_ours_ends_an_engine(
        memory_bench, bench, run_engine, VLLM, "tests.support.faults:install_vllm", tmp_path
    )


def test_fault01_control_without_guards_what_we_raise_reaches_the_engine(memory_bench, bench, tmp_path):
    place = {"enter tables": VLLM["enter tables"]}
    with pytest.raises(AssertionError, match="Injected"):
        scenarios.no_exception_of_ours_ends_an_engine(
            memory_bench,
            bench,
            run_engine,
            place,
            "tests.support.faults:vllm_without_guards",
            tmp_path,
            errors_are_results=False,
        )
