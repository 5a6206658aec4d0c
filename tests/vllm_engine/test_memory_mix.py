"""Explicit memory together with δ-mem, with LoRA, with retrieval; and with our Triton kernels in vLLM's worker."""

from __future__ import annotations

import pytest

from mem_triton.store.pool.plan import FOREVER, Attachment
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.kernels_on_cpu import RAN
from tests.support.memory_bench import reference
from tests.support.memory_scenarios import PROMPTS, ask, seen
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine

BLOCK = 32
RUNNERS = {"v1": {}, "v2": {"runner": "v2"}, "v1-tp2": {"tensor_parallel_size": 2}}


@pytest.mark.parametrize("runner", ways(["v1", "v2"], soak="v1"))
def test_both_memories_and_a_session_at_once(memory_bench, bench, runner):
    scenarios.both_memories_and_a_session_at_once(memory_bench, bench, run_engine, BLOCK, **RUNNERS[runner])


def test_lora_and_memory_together(memory_bench, lora_bench):
    options = {"enable_lora": True, "max_lora_rank": 8}
    scenarios.lora_and_memory_together(memory_bench, lora_bench, run_engine, **options)


@pytest.mark.parametrize("runner", ways(RUNNERS, soak="v1 v1-tp2"))
def test_b11_retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(memory_bench, runner):
    scenarios.retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(memory_bench, run_engine, **RUNNERS[runner])


def test_without_refreshes_the_last_references_stay(memory_bench):
    m, prompt = memory_bench, reference(3) + reference(9)
    section = m.section(m.references, retrieval={"top_k": 1, "every": 32, "refresh": False})
    result = run_engine(m.model, [[ask(prompt, 50), {**ask(prompt, 50), "stop": ["never"]}]], memory=section)
    parts = [(r, first, end) for r, first, end in seen(result["rounds"][0][0])]
    assert parts[-1][2] == FOREVER and tokens(result)[0] == tokens(result)[1]
    assert tokens(result)[0] == m.with_plan(prompt, [Attachment(*p) for p in parts], 50)


def test_fault01_a_full_pool_ends_the_refreshes_and_not_the_answer(memory_bench):
    scenarios.a_full_pool_ends_the_refreshes_and_not_the_answer(memory_bench, run_engine)


def test_what_cannot_be_refreshed_is_said(memory_bench):
    m = memory_bench
    section = m.section(m.references, retrieval={"top_k": 1, "every": 8})
    result = run_engine(m.model, [[{**ask(PROMPTS[1], 20), "stop": ["never"]}]], memory=section)
    assert result["rounds"][0][0]["memory"]["refresh"] == "off: stop strings" and len(tokens(result)[0]) == 20


@pytest.mark.parametrize("which", ["prefixes", "references"])
def test_the_triton_kernels_in_the_worker(memory_bench, which):
    """The fused kernel, interpreted, where the CPU worker would run torch."""
    m, (short, middle, *_) = memory_bench, PROMPTS
    tamper = "tests.support.kernels_on_cpu:memory_attention"
    if which == "prefixes":
        batch = [ask(short, 4, "beta"), ask(middle, 4)]
        expected = [m.after(short, "beta", count=4), m.after(middle, count=4)]
    else:
        batch = [ask(short, 4, "ref-1", "ref-2"), ask(middle, 4)]
        expected = [m.with_plan(short, [Attachment("ref-1@1"), Attachment("ref-2@1")], 4), m.generate(middle, 4)]
    section = m.section(getattr(m, which))
    result = run_engine(m.model, [batch], memory=section, runner="v2", tamper=tamper)
    assert tokens(result) == expected and f"{RAN} attention" in result["output"]
