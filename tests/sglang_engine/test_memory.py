"""Explicit memory on real SGLang: the right memory for every row, whatever the engine does with it meanwhile."""

from __future__ import annotations

import json

import pytest

from tests.sglang_engine.engine import run_engine, with_lora
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_scenarios import PROMPTS, ask

pytestmark = pytest.mark.engine

PAGE = 16
WAYS = {"default": {}, "tp2": {"tp_size": 2}, "pp2": {"pp_size": 2}}
TAMPER = "tests.sglang_engine.tamper"


@pytest.mark.parametrize("way", ["default", pytest.param("tp2", marks=pytest.mark.slow)])
def test_b6_b10_every_row_has_its_own_memory(memory_bench, way):
    scenarios.every_row_has_its_own_memory(memory_bench, run_engine, PAGE, **WAYS[way])


def test_b10_control_without_memory_in_the_radix_keys_wrong_tokens_appear(memory_bench):
    scenarios.without_memory_in_the_cache_keys_wrong_tokens_appear(
        memory_bench, run_engine, f"{TAMPER}:no_memory_in_radix_keys"
    )


def test_retracted_requests_find_their_memory_and_their_state_again(memory_bench, bench):
    m = memory_bench
    names = [("alpha",), (), ("beta",), ("gamma",), ("alpha", "beta"), ()]
    prompts = [PROMPTS[i % 4] for i in range(6)]
    batch = [ask(p, 60, *n) for p, n in zip(prompts, names, strict=True)]
    result = run_engine(m.model, [batch], memory={**bench.memory, **m.section()}, tamper=f"{TAMPER}:retract_often")
    assert tokens(result) == [scenarios.answer(bench, m, p, *n, count=60) for p, n in zip(prompts, names, strict=True)]
    assert sum(a["retractions"] for a in result["rounds"][0]) > 0


@pytest.mark.slow  # the front end's doing, and vLLM's tests have it each time
def test_a_pool_too_small_for_all_serves_them_in_turn(memory_bench):
    scenarios.a_pool_too_small_for_all_serves_them_in_turn(memory_bench, run_engine)


@pytest.mark.slow  # the front end's doing, and vLLM's tests have it each time
def test_control_without_pins_eviction_breaks_a_running_request(memory_bench):
    scenarios.without_pins_eviction_breaks_a_running_request(memory_bench, run_engine, "tests.support.controls:no_pins")


def test_sparse_references_beside_a_constant_prefix(memory_bench):
    scenarios.sparse_references_beside_a_constant_prefix(memory_bench, run_engine)


@pytest.mark.parametrize("way", [pytest.param("default", marks=pytest.mark.slow), "tp2", "pp2"])
def test_both_memories_and_a_session_at_once(memory_bench, bench, way):
    scenarios.both_memories_and_a_session_at_once(memory_bench, bench, run_engine, PAGE, **WAYS[way])


def test_lora_and_memory_together(memory_bench, lora_bench):
    """The projections that a LoRA has wrapped carry the corrections, too."""
    lora = str(lora_bench.lora)
    scenarios.lora_and_memory_together(
        memory_bench,
        lora_bench,
        run_engine,
        **with_lora(lora),
    )


@pytest.mark.parametrize("way", ["default", pytest.param("tp2", marks=pytest.mark.slow)])
def test_b11_retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(memory_bench, way):
    scenarios.retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(memory_bench, run_engine, **WAYS[way])


@pytest.mark.slow  # the front end's doing, and vLLM's tests have it each time
def test_fault01_a_full_pool_ends_the_refreshes_and_not_the_answer(memory_bench):
    scenarios.a_full_pool_ends_the_refreshes_and_not_the_answer(memory_bench, run_engine)


def test_fault14_options_that_change_a_bank_s_keys_are_refused_at_start(memory_bench):
    """On the engine's own reading of the folder; a longer context, which changes none, is served."""
    b = memory_bench
    longer = {"json_model_override_args": json.dumps({"max_position_embeddings": 8192})}
    result = run_engine(b.model, [[ask(PROMPTS[0], 12, "alpha")]], memory=b.section(), **longer)
    assert tokens(result) == [b.after(PROMPTS[0], "alpha")]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rms_norm_eps": 1e-3}
    output = run_engine(b.model, [], memory=b.section(), fails=True, json_model_override_args=json.dumps(rope))
    assert "RoPE: the folder has {'rope_theta': 10000.0}, the engine {'rope_theta': 5000.0}" in output
    assert "rms_norm_eps: the folder has 1e-06, the engine 0.001" in output and "--json-model-override-args" in output
    output = run_engine(b.model, [], memory=b.section(), fails=True, quantization="fp8", dtype="bfloat16")
    assert "the engine quantises the weights (fp8)" in output
