"""Real SGLang with δ-mem against transformers, token for token in fp32: every way in which the engine may batch."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support.bench import make_bench
from tests.support.cases import request, tokens

pytestmark = pytest.mark.engine

WAYS = {
    "default": {},
    "page_of_one_token": {"page_size": 1},
    "no_overlap": {"disable_overlap_schedule": True},
    "no_radix_cache": {"disable_radix_cache": True},
    "mixed_chunk": {"enable_mixed_chunk": True},
    "tensor_parallel": {"tp_size": 2},
}
CACHED = {"page_of_one_token": [6, 29, 149, 64], "no_radix_cache": [0, 0, 0, 0]}


SOAK = ("no_overlap", "no_radix_cache", "mixed_chunk", "tensor_parallel")
"""With both memories at once, ``test_memory.py`` runs tensor parallelism in every run of the tests."""


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SOAK)) for way in WAYS])
def test_a9_tokens_equal_transformers_cold_and_from_the_radix_cache(bench, prompts, way):
    """Mixed lengths in one batch, chunked prefill; then again, when prefixes come from the radix cache."""
    result = run_engine(bench.model, [[request(p) for p in prompts]] * 2, memory=bench.memory, **WAYS[way])
    expected = [bench.fresh(p) for p in prompts]
    assert tokens(result, 0) == expected
    assert tokens(result, 1) == expected
    cached = [answer["cached"] for answer in result["rounds"][1]]
    assert cached == CACHED.get(way, [0, 16, 144, 64]), "states came with their pages"
    assert result["facts"]["overlap"] == (way != "no_overlap") and result["facts"]["backend"] == "mem_triton"


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pipeline_rank_without_memory(tmp_path, prompts, layer):
    """Two ranks, one of which has no layer of the adapter."""
    bench = make_bench(tmp_path, target_layers=(layer,))
    result = run_engine(bench.model, [[request(p) for p in prompts]], memory=bench.memory, pp_size=2)
    assert tokens(result) == [bench.fresh(p) for p in prompts]


def test_memory_changes_tokens(bench, prompts):
    """Without this the comparison above would prove nothing."""
    stock = run_engine(bench.model, [[request(p) for p in prompts]])
    assert all(a != bench.fresh(p) for a, p in zip(tokens(stock), prompts, strict=True))
    assert stock["facts"]["page_size"] == 1, "without the plugin's flag SGLang's own default stays"


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "mistral"))]
)
def test_every_family_and_kind_of_adapter(tmp_path, prompts, family):
    bench = make_bench(tmp_path, family)
    result = run_engine(bench.model, [[request(p) for p in prompts]], memory=bench.memory)
    assert tokens(result) == [bench.fresh(p) for p in prompts]


@pytest.mark.slow
def test_retracted_requests_resume_right(bench, prompts):
    asked = [p * 2 if len(p) < 50 else p for p in prompts]
    often = "tests.sglang_engine.tamper:retract_often"
    result = run_engine(bench.model, [[request(p, 60) for p in asked]], memory=bench.memory, tamper=often)
    assert sum(answer["retractions"] for answer in result["rounds"][0]) > 0
    assert tokens(result) == [bench.fresh(p, 60) for p in asked]


def test_states_lost_with_a_cached_prefix_would_be_wrong(bench, prompts):
    """Negative control of the cells: a cached prefix that comes back without its state."""
    result = run_engine(
        bench.model,
        [[request(p) for p in prompts], *([request(p)] for p in prompts)],
        memory=bench.memory,
        tamper="tests.sglang_engine.tamper:cells_forget_prefixes",
    )
    expected = [bench.fresh(p) for p in prompts]
    again = [answers[0] for answers in result["rounds"][1:]]
    assert tokens(result, 0) == expected
    assert [a["cached"] for a in again] == [0, 16, 144, 64]
    assert [a["tokens"] == e for a, e in zip(again, expected, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize(
    "way", ["correction_on_every_rank", pytest.param("correction_on_no_rank", marks=pytest.mark.slow)]
)
def test_the_correction_of_o_belongs_on_one_rank(bench, prompts, way):
    """Negative control of the partial sums under tensor parallelism."""
    result = run_engine(
        bench.model,
        [[request(p) for p in prompts]],
        memory=bench.memory,
        tp_size=2,
        tamper=f"tests.sglang_engine.tamper:{way}",
    )
    assert tokens(result) != [bench.fresh(p) for p in prompts]


@pytest.mark.parametrize(("page", "states"), [(1, 512), (16, 32)])
def test_states_are_part_of_a_tokens_bytes(page, states):
    """SGLang sizes its KV cache by what a token takes; two layers keep 256 bytes a page each."""
    from types import SimpleNamespace

    from mem_triton.ops.delta_rule.reference import DeltaRuleSpec
    from mem_triton_sglang.states import DeltaStates
    from mem_triton_sglang.worker import SGLangWorkerMemory, after_cell_size

    delta = DeltaStates(DeltaRuleSpec(8, 1), slots=None, layers=2, page_size=page)
    memory = SGLangWorkerMemory(None)
    memory.states = delta
    model = SimpleNamespace(mem_triton=memory)
    assert after_cell_size(1024, None, SimpleNamespace(model=model), 2) == 1024 + states
    assert after_cell_size(1024, None, SimpleNamespace(model=SimpleNamespace()), 2) == 1024


def test_fields_that_came_in_by_another_door_are_refused_and_the_engine_lives(bench, prompts):
    """A front end that is not ours, as with several tokenizer workers, would answer without memory."""
    result = run_engine(
        bench.model,
        [[request(prompts[0], fields={"mem_session": "alice"})], [request(prompts[0])]],
        memory=bench.memory,
        errors_are_results=True,
        tamper="tests.sglang_engine.tamper:no_front_end",
    )
    assert "mem_session: mem_triton is not active in the process that took this request" in result["rounds"][0]["error"]
    assert tokens(result, 1) == [bench.fresh(prompts[0])]
