"""Our own code raises inside a running SGLang: the engine lives on, and nobody gets a wrong answer."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import fault_scenarios as scenarios
from tests.support.faults import SGLANG

pytestmark = pytest.mark.engine


def test_fault01_no_exception_of_ours_ends_an_engine(memory_bench, bench, tmp_path):
    scenarios.no_exception_of_ours_ends_an_engine(
        memory_bench, bench, run_engine, SGLANG, "tests.support.faults:install_sglang", tmp_path
    )


@pytest.mark.slow
def test_fault01_control_without_guards_what_we_raise_ends_the_engine(memory_bench, bench, tmp_path):
    place = {"enter tables": SGLANG["enter tables"]}
    with pytest.raises(AssertionError):
        scenarios.no_exception_of_ours_ends_an_engine(
            memory_bench, bench, run_engine, place, "tests.support.faults:sglang_without_guards", tmp_path
        )
