"""MemoryLLM's pools on real SGLang, against transformers with the same store."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine, with_lora
from tests.support import pool_scenarios as scenarios
from tests.support.pool_engine_scenarios import *  # noqa: F403

pytestmark = pytest.mark.engine
PAGE = 16


def test_c1_c6_c7_c10_every_row_reads_its_own_version(pool_bench, tmp_path):
    scenarios.every_row_reads_its_own_version(pool_bench, tmp_path, run_engine, PAGE)


def test_control_without_pools_in_the_radix_keys(pool_bench, tmp_path):
    tamper = "tests.sglang_engine.tamper:no_memory_in_radix_keys"
    scenarios.without_pools_in_the_cache_keys_wrong_tokens_appear(pool_bench, tmp_path, run_engine, tamper)


def test_the_adapter_that_reads_may_be_a_lora_adapter(pool_bench, tmp_path):
    read = str(tmp_path / "apart" / "read")
    scenarios.the_adapter_that_reads_is_served_as_lora(
        pool_bench,
        tmp_path,
        run_engine,
        **with_lora(read),
    )


def test_pipeline_stages_write_and_read(pool_bench, tmp_path):
    scenarios.texts_are_written_and_read(pool_bench, tmp_path, run_engine, pp_size=2)


@pytest.mark.slow
def test_tensor_parallel_ranks_write_and_read(pool_bench, tmp_path):
    scenarios.every_row_reads_its_own_version(pool_bench, tmp_path / "read", run_engine, PAGE, tp_size=2)
    scenarios.texts_are_written_and_read(pool_bench, tmp_path / "write", run_engine, tp_size=2)
