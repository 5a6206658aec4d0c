"""Sessions on real vLLM: a state that outlives its request, against transformers that carries the state over."""

from __future__ import annotations

import shutil

import pytest

from tests.support import session_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_scenarios import ask
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine

WAYS = {
    "v1": {},
    "v2": {"runner": "v2"},
    "v2_async": {"runner": "v2", "force_async": True},
    "v1_tensor_parallel": {"tensor_parallel_size": 2},
    "v2_pipeline_parallel": {"runner": "v2", "pipeline_parallel_size": 2, "env": {"TORCHDYNAMO_DISABLE": "1"}},
}


@pytest.mark.parametrize("way", ways(WAYS, soak="v2 v1_tensor_parallel"))
def test_sessions_carry_their_state_over(bench, prompts, tmp_path, way):
    scenarios.sessions_carry_their_state_over(bench, prompts, run_engine, tmp_path, 32, **WAYS[way])


def test_sessions_survive_a_restart(bench, prompts, tmp_path):
    memory = {**bench.memory, "session_dir": str(tmp_path)}
    run_engine(bench.model, [[ask(prompts[2], mem_session="alice")]], memory=memory)
    result = run_engine(bench.model, [[ask(prompts[3], mem_session="alice")]], memory=memory, runner="v2")
    bench.forget()
    bench.generate(prompts[2])
    assert tokens(result) == [bench.generate(prompts[3])]


def test_fault14_sessions_belong_to_the_model_as_it_was_computed(bench, prompts, tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    scenarios.sessions_belong_to_the_model_as_it_was_computed(
        bench, prompts, run_engine, tmp_path, {"hf_overrides": rope}
    )


def test_fault14_an_overwritten_lora_is_another_one_when_it_is_loaded(lora_bench, prompts, tmp_path):
    options = {"enable_lora": True, "max_lora_rank": 8}
    scenarios.an_overwritten_lora_is_another_one_when_it_is_loaded(
        lora_bench, prompts, run_engine, 32, tmp_path / "lora", **options
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["first named", "in place"])
def test_fault14_a_lora_that_changes_behind_an_admission_is_the_one_that_was_admitted(
    lora_bench, prompts, tmp_path, inplace
):
    options = {"enable_lora": True, "max_lora_rank": 8, "request": {"inplace": 1} if inplace else {}}
    scenarios.a_lora_that_changes_behind_an_admission_is_the_one_that_was_admitted(
        lora_bench, prompts, run_engine, tmp_path / "lora", **options
    )


def test_fault14_control_an_adapter_that_is_loaded_in_the_step_is_mistaken_for_another(lora_bench, prompts, tmp_path):
    options = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "tamper": "tests.vllm_engine.tamper:adapters_loaded_in_the_step",
    }
    scenarios.a_lora_that_changes_behind_an_admission_is_the_one_that_was_admitted(
        lora_bench, prompts, run_engine, tmp_path / "lora", **options
    )


def test_without_memory_in_the_cache_key_tokens_are_wrong(bench, prompts):
    """Negative control."""
    scenarios.without_memory_in_the_cache_keys_tokens_are_wrong(
        bench, prompts, run_engine, "tests.vllm_engine.tamper:no_memory_in_cache_keys"
    )


def test_flags_and_refusals_of_one_request(bench, prompts):
    scenarios.flags_and_refusals_of_one_request(bench, prompts, run_engine)


@pytest.mark.parametrize("runner", ways(["v1", "v2"], soak="v2"))
def test_fault16_a_scope_of_sessions_leaves_plain_requests_to_the_engine(bench, prompts, tmp_path, runner):
    """The adapter says so itself."""
    adapter = shutil.copytree(bench.adapter, tmp_path / "adapter")
    (adapter / "mem_triton.json").write_text('{"scope": "sessions"}')
    memory, wired = {"delta": {"adapter": str(adapter)}}, "tests.support.kernels_on_cpu:as_on_a_gpu"
    printed = scenarios.a_scope_of_sessions_leaves_plain_requests_to_the_engine(
        bench, prompts, run_engine, 32, memory, wired, runner=runner
    )
    assert "the model's own norm and RoPE, as requests without a session get the model's own bits" in printed


@pytest.mark.parametrize("tamper", ["", "tests.support.controls:one_last_state_only"])
def test_a_stop_token_is_not_part_of_the_state(bench, prompts, tamper):
    """Async scheduling runs one step past it."""
    scenarios.a_stop_token_is_not_part_of_the_state(bench, prompts, run_engine, tamper, runner="v2", force_async=True)
