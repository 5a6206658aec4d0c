"""M+ on real vLLM, against transformers with the same store, which the authors' code is compared with."""

from __future__ import annotations

from functools import partial

import pytest

from tests.support import fault_scenarios
from tests.support import pool_scenarios as scenarios
from tests.support import pool_server_scenarios as server_scenarios
from tests.support.pool_bench import PoolBench, make_pool_bench
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine
WHOLE = {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_num_seqs": 8}
run_whole = partial(run_engine, **WHOLE)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> PoolBench:
    return make_pool_bench(tmp_path_factory.mktemp("mplus"), mplus=True)


@pytest.mark.parametrize("runner", ways(["v1", "v2"], soak="v2"))
def test_c7_c9_prompts_choose_long_term_rows(bench, tmp_path, runner):
    scenarios.prompts_choose_long_term_rows(bench, tmp_path, run_whole, runner=runner)


def test_c3_c11_long_term_rows_are_written(bench, tmp_path):
    scenarios.long_term_rows_are_written(bench, tmp_path, run_whole)


def test_fault01_no_exception_of_ours_ends_an_engine(bench, tmp_path):
    fault_scenarios.no_exception_of_ours_in_pools_ends_an_engine(bench, run_whole, tmp_path)


@pytest.mark.slow
def test_c9_over_http(bench, tmp_path, start_server):
    store = bench.store(tmp_path)
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "512", "--max-model-len", "512"]
    server = start_server(bench.model, bench.section(store, chunk=32), whole)
    server_scenarios.test_c3_c8_a_text_is_written_and_read(server, bench, store, tmp_path)


@pytest.mark.slow
def test_each_part_of_a_prompt_may_choose_for_itself(bench, tmp_path):
    """Split prompts are served where that is configured; what fits into one step is as in transformers."""
    store = bench.store(tmp_path)
    section = bench.section(store, ltm={"selection": "chunk", "device_keys": False, "tier": "device"})
    result = run_engine(bench.model, [[scenarios.ask(p)] for p in scenarios.PROMPTS], memory=section)
    for (answer,), prompt in zip(result["rounds"], scenarios.PROMPTS, strict=True):
        assert len(answer["tokens"]) == 12 and answer["finish"] == "length"
        if len(prompt) <= 64:
            scenarios.same_scores(answer, bench.scored(store, prompt, "main"))


@pytest.mark.parametrize(
    "tamper",
    [
        "rows_stand_unordered",
        pytest.param("stock_frequencies", marks=pytest.mark.slow),
        pytest.param("prompts_choose_by_their_first_token", marks=pytest.mark.slow),
    ],
)
def test_controls(bench, tmp_path, tamper):
    scenarios.other_rows_give_other_tokens(bench, tmp_path, run_whole, tamper=f"tests.support.controls:{tamper}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this engine splits prompts; start it with --no-enable-chunked-prefill"),
        pytest.param({**WHOLE, "enforce_eager": False}, "start with --enforce-eager", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(bench, tmp_path, options, message):
    section = bench.section(bench.store(tmp_path))
    assert message in run_engine(bench.model, [], memory=section, fails=True, **options)


@pytest.mark.slow
def test_tensor_parallel_ranks_choose_and_write(bench, tmp_path):
    """Every rank chooses the same rows, and keeps its heads of them."""
    options = {"tensor_parallel_size": 2}
    scenarios.long_term_rows_are_written(bench, tmp_path, run_whole, **options)
