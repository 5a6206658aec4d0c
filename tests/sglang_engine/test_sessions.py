"""Sessions on real SGLang: a state that outlives its request, against transformers that carries the state over."""

from __future__ import annotations

import json

import pytest

from tests.sglang_engine.engine import run_engine, with_lora
from tests.support import session_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_scenarios import ask

pytestmark = pytest.mark.engine

WAYS = {
    "default": {},
    "page_of_one_token": {"page_size": 1},
    "no_overlap": {"disable_overlap_schedule": True},
    "tensor_parallel": {"tp_size": 2},
    "pipeline_parallel": {"pp_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_sessions_carry_their_state_over(bench, prompts, tmp_path, way):
    scenarios.sessions_carry_their_state_over(
        bench, prompts, run_engine, tmp_path, WAYS[way].get("page_size", 16), **WAYS[way]
    )


def test_fault14_sessions_belong_to_the_model_as_it_was_computed(bench, prompts, tmp_path):
    rope = json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    scenarios.sessions_belong_to_the_model_as_it_was_computed(
        bench, prompts, run_engine, tmp_path, {"json_model_override_args": rope}
    )


def test_fault14_an_overwritten_lora_is_another_one_when_it_is_loaded(lora_bench, prompts, tmp_path):
    folder = str(tmp_path / "lora")
    scenarios.an_overwritten_lora_is_another_one_when_it_is_loaded(
        lora_bench,
        prompts,
        run_engine,
        16,
        tmp_path / "lora",
        **with_lora(folder),
    )


def test_fault14_an_adapter_that_was_never_loaded_is_refused_by_name(lora_bench, prompts):
    """SGLang loads none that a request is first to name; the request's session is free for the next one."""
    rounds = [
        [{**ask(prompts[0], mem_session="alice"), "lora": str(lora_bench.lora)}],
        [ask(prompts[0], mem_session="alice")],
    ]
    result = run_engine(
        lora_bench.model,
        rounds,
        memory=lora_bench.memory,
        errors_are_results=True,
        enable_lora=True,
        max_lora_rank=8,
        lora_target_modules=["q_proj"],
        lora_backend="torch_native",
        tamper="tests.sglang_engine.tamper:no_pinned_memory",
    )
    assert f"LoRA adapter that has never been loaded: {lora_bench.lora}" in result["rounds"][0]["error"]
    assert len(tokens(result, 1)[0]) == 12


def test_without_memory_in_the_radix_keys_tokens_are_wrong(bench, prompts):
    """Negative control."""
    scenarios.without_memory_in_the_cache_keys_tokens_are_wrong(
        bench, prompts, run_engine, "tests.sglang_engine.tamper:no_memory_in_radix_keys"
    )


def test_flags_and_refusals_of_one_request(bench, prompts):
    scenarios.flags_and_refusals_of_one_request(bench, prompts, run_engine)


def test_fault16_a_scope_of_sessions_leaves_plain_requests_to_the_engine(bench, prompts):
    """The server says so."""
    memory = {"delta": {"adapter": str(bench.adapter), "scope": "sessions"}}
    wired = "tests.support.kernels_on_cpu:sglang_in_one_launch"
    printed = scenarios.a_scope_of_sessions_leaves_plain_requests_to_the_engine(
        bench, prompts, run_engine, 16, memory, wired
    )
    assert "projections in their own matmul" in printed


@pytest.mark.parametrize("tamper", ["", "tests.support.controls:one_last_state_only"])
def test_a_stop_token_is_not_part_of_the_state(bench, prompts, tamper):
    """Overlap scheduling, SGLang's default, runs one step past it."""
    scenarios.a_stop_token_is_not_part_of_the_state(bench, prompts, run_engine, tamper)
