"""Pools of 8-bit pages on real vLLM."""

from __future__ import annotations

import pytest

from tests.support import memory_scenarios as scenarios
from tests.support.memory_bench import make_memory_bench
from tests.vllm_engine.engine import run_engine

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("pool_dtype", ["int8", "fp8"])
def test_smaller_pages_are_read_as_what_they_hold(tmp_path, pool_dtype):
    scenarios.smaller_pages_are_read_as_what_they_hold(make_memory_bench(tmp_path), run_engine, pool_dtype)
