"""M+ on real SGLang, against transformers with the same store, which the authors' code is compared with."""

from __future__ import annotations

from functools import partial

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import fault_scenarios
from tests.support import pool_scenarios as scenarios
from tests.support import pool_server_scenarios as server_scenarios
from tests.support.pool_bench import PoolBench, make_pool_bench

pytestmark = pytest.mark.engine
WHOLE = {"chunked_prefill_size": -1, "mem_fraction_static": 0.3}
"""SGLang's own guess of the fraction is negative without chunks on a CPU."""
run_whole = partial(run_engine, **WHOLE)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("mplus"), mplus=True)


def test_c7_c9_prompts_choose_long_term_rows(bench, tmp_path):
    scenarios.prompts_choose_long_term_rows(bench, tmp_path, run_whole)


def test_c3_c11_long_term_rows_are_written(bench, tmp_path):
    scenarios.long_term_rows_are_written(bench, tmp_path, run_whole)


def test_fault01_no_exception_of_ours_ends_an_engine(bench, tmp_path):
    fault_scenarios.no_exception_of_ours_in_pools_ends_an_engine(bench, run_whole, tmp_path)


@pytest.mark.slow
def test_c9_over_http(bench, tmp_path, start_server):
    store = bench.store(tmp_path)
    server = start_server(bench.model, bench.section(store, chunk=32), **WHOLE)
    server_scenarios.test_c3_c8_a_text_is_written_and_read(server, bench, store, tmp_path)


def test_a_server_that_splits_prompts_is_refused_at_start(bench, tmp_path):
    section = bench.section(bench.store(tmp_path))
    assert "start it with --chunked-prefill-size -1" in run_engine(bench.model, [], memory=section, fails=True)


@pytest.mark.slow
def test_control_without_the_listed_frequencies(bench, tmp_path):
    tamper = "tests.support.controls:stock_frequencies"
    scenarios.other_rows_give_other_tokens(bench, tmp_path, run_whole, tamper=tamper)
