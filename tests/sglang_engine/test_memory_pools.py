"""Pools of 8-bit pages on real SGLang."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import memory_scenarios as scenarios

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("pool_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_smaller_pages_are_read_as_what_they_hold(memory_bench, pool_dtype):
    scenarios.smaller_pages_are_read_as_what_they_hold(memory_bench, run_engine, pool_dtype)
