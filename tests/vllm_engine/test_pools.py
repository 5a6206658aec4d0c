"""MemoryLLM's pools on real vLLM, against transformers with the same store."""

from __future__ import annotations

import pytest

from mem_triton.systems.delta_mem import save_adapter
from tests.support import pool_scenarios as scenarios
from tests.support.models import random_adapter
from tests.support.pool_engine_scenarios import *  # noqa: F403
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine
PAGE = 32
CONTROLS = "tests.support.controls"


@pytest.mark.parametrize("runner", ways(["v1", "v2"], soak="v2"))
def test_c1_c6_c7_c10_every_row_reads_its_own_version(pool_bench, tmp_path, runner):
    scenarios.every_row_reads_its_own_version(pool_bench, tmp_path, run_engine, PAGE, runner=runner)


@pytest.mark.parametrize(
    ("scenario", "tamper"),
    [
        ("without_pools_in_the_cache_keys_wrong_tokens_appear", "tests.vllm_engine.tamper:no_memory_in_block_keys"),
        ("reading_with_the_writing_adapter_gives_other_tokens", f"{CONTROLS}:pools_read_with_the_writing_adapter"),
        ("versions_are_read_in_turn", f"{CONTROLS}:no_pins"),
    ],
)
def test_controls(pool_bench, tmp_path, scenario, tamper):
    getattr(scenarios, scenario)(pool_bench, tmp_path, run_engine, tamper=tamper)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_tensor_parallel_ranks_write_and_read(pool_bench, tmp_path, runner):
    eager = {"TORCHDYNAMO_DISABLE": "1"} if runner == "v2" else {}
    options = {"runner": runner, "tensor_parallel_size": 2, "env": eager}
    scenarios.every_row_reads_its_own_version(pool_bench, tmp_path / "read", run_engine, PAGE, **options)
    scenarios.texts_are_written_and_read(pool_bench, tmp_path / "write", run_engine, **options)


def test_pipeline_stages_write_and_read(pool_bench, tmp_path):
    options = {"runner": "v2", "pipeline_parallel_size": 2, "env": {"TORCHDYNAMO_DISABLE": "1"}}
    scenarios.texts_are_written_and_read(pool_bench, tmp_path, run_engine, **options)


@pytest.mark.slow
def test_beside_compiled_layers(pool_bench, tmp_path):
    """The model is compiled, its layers are called beside that."""
    scenarios.texts_are_written_and_read(pool_bench, tmp_path, run_engine, enforce_eager=False)


@pytest.mark.slow
def test_beside_the_loras_of_requests(pool_bench, tmp_path):
    """What LoRA has put around the layers is left out of a write."""
    options = {"enable_lora": True, "max_lora_rank": 8}
    scenarios.texts_are_written_and_read(pool_bench, tmp_path, run_engine, **options)


def test_the_adapter_that_reads_may_be_a_lora_adapter(pool_bench, tmp_path):
    options = {"enable_lora": True, "max_lora_rank": 8}
    scenarios.the_adapter_that_reads_is_served_as_lora(pool_bench, tmp_path, run_engine, **options)


@pytest.mark.slow
def test_beside_sessions(pool_bench, tmp_path):
    """What δ-mem has put around the layers is left out of a write; requests without a session read the pool alone."""
    adapter = save_adapter(random_adapter(pool_bench.oracle), tmp_path / "adapter")
    delta = {"delta": {"adapter": str(adapter), "scope": "sessions"}}
    scenarios.texts_are_written_and_read(pool_bench, tmp_path, run_engine, beside=delta)
