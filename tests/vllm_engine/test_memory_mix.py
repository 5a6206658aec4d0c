"""Explicit memory together with δ-mem, with LoRA, with retrieval; and with our Triton kernels in vLLM's worker."""

from __future__ import annotations

import pytest

from mem_triton.store.bank import Bank
from mem_triton.store.plan import FOREVER, Attachment
from mem_triton_transformers.explicit import read_plans
from tests.support.memory_bench import MemoryBench, make_memory_bench, reference, tokens_of
from tests.vllm_engine.engine import request, run_engine, tokens
from tests.vllm_engine.test_memory import PROMPTS, reads

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


def answer(bench, prefixes, prompt: list[int], *ids: str, count: int = 12, fresh: bool = True) -> list[int]:
    """What a model with δ-mem or a LoRA of its own says with entries attached."""
    if fresh:
        bench.forget()
    with Bank.open(prefixes) as bank, read_plans(bench.oracle, bank, [[Attachment(f"{i}@1") for i in ids]]):
        return bench.generate(prompt, count)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_both_memories_and_a_session_at_once(memory_bench, bench, runner):
    m, (short, middle, long, _) = memory_bench, PROMPTS
    told = {"extra_args": {"mem_session": "s", "mem_ids": ["alpha"]}}
    rounds = [
        [request(short, **reads("alpha")), request(middle), request(long, **reads("beta")), request(middle, **told)],
        [request(short, extra_args={"mem_session": "s", "mem_ids": ["beta"]}), request(long, **reads("beta"))],
    ]
    result = run_engine(m.model, rounds, memory={**bench.memory, **m.section()}, runner=runner)
    first = [answer(bench, m.prefixes, p, *ids) for p, ids in ((short, ["alpha"]), (middle, []), (long, ["beta"]))]
    assert tokens(result, 0) == [*first, answer(bench, m.prefixes, middle, "alpha")]
    assert tokens(result, 1)[0] == answer(bench, m.prefixes, short, "beta", fresh=False), "alice's state went on"
    assert tokens(result, 1)[1] == first[2] and result["rounds"][1][1]["cached"] == 128


def test_lora_and_memory_together(memory_bench, lora_bench):
    m, (short, _, long, _) = memory_bench, PROMPTS
    lora = str(lora_bench.lora)
    batch = [request(short, lora=lora, **reads("alpha")), request(long, lora=lora, **reads("beta"))]
    memory = {**lora_bench.memory, **m.section()}
    result = run_engine(m.model, [batch], memory=memory, enable_lora=True, max_lora_rank=8)
    assert tokens(result) == [
        answer(lora_bench, m.prefixes, short, "alpha"), answer(lora_bench, m.prefixes, long, "beta")
    ]  # fmt: skip


@pytest.mark.parametrize("runner", ["v1", "v2", "v1-tp2"])
def test_b11_retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(memory_bench, runner):
    m, options = memory_bench, {"v1": {}, "v2": {"runner": "v2"}, "v1-tp2": {"tensor_parallel_size": 2}}[runner]
    prompt = reference(3) + reference(9)[:20] + reference(14) + tokens_of(1, 9)
    section = m.section(m.references, retrieval={"top_k": 2, "every": 32})
    batch = [
        request(prompt, 80),
        request(prompt, 10, extra_args={"mem_top_k": 0}),
        request(PROMPTS[0], 70, extra_args={"mem_top_k": 1}),
        request(prompt, 10, **reads("ref-5")),
    ]
    result = run_engine(m.model, [batch, batch[:1]], memory=section, **options)
    expected, plan = m.retrieving(prompt, 80, top_k=2, every=32)
    short, short_plan = m.retrieving(PROMPTS[0], 70, top_k=1, every=32)
    assert tokens(result) == [
        expected, m.generate(prompt, 10), short, m.with_plan(prompt, [Attachment("ref-5@1")], 10)
    ]  # fmt: skip
    assert tokens(result, 1) == [expected] and result["rounds"][1][0]["cached"] > 0
    assert seen(result["rounds"][0][0]) == [(a.ref, a.first, a.end) for a in plan]
    assert seen(result["rounds"][0][2]) == [(a.ref, a.first, a.end) for a in short_plan]
    assert "ref-3@1" in {a.ref for a in plan if a.first == 0}, "a chunk finds the reference that it quotes"
    starts = sorted({a.first for a in plan})
    assert starts == [0, 32, 64, 96] + [len(prompt) + 32 * i for i in (1, 2)] if len(prompt) > 96 else True


def seen(answer: dict) -> list[tuple[str, int, int]]:
    """(reference, first, end) in the order of a plan, out of an answer's report."""
    parts = answer["memory"]["references"]
    return [(e["id"], p["first_token"], p["end_token"] or FOREVER) for p in parts for e in p["entries"]]


def test_without_refreshes_the_last_references_stay(memory_bench):
    m, prompt = memory_bench, reference(3) + reference(9)
    section = m.section(m.references, retrieval={"top_k": 1, "every": 32, "refresh": False})
    result = run_engine(m.model, [[request(prompt, 50), request(prompt, 50, stop=["never"])]], memory=section)
    parts = [(r, first, end) for r, first, end in seen(result["rounds"][0][0])]
    assert parts[-1][2] == FOREVER and tokens(result)[0] == tokens(result)[1]
    assert tokens(result)[0] == m.with_plan(prompt, [Attachment(*p) for p in parts], 50)


def test_a_full_pool_ends_the_refreshes_and_not_the_answer(memory_bench):
    """Three pages and two requests: whoever holds some does not wait for more, or both would wait for ever."""
    m, page = memory_bench, 2 * 8 * 2 * 32 * 4  # KV heads, tokens, K and V, head size, fp32; one layer
    section = m.section(m.references, pool_gib=3.5 * page / 2**30, retrieval={"top_k": 2, "every": 16})
    prompts = [reference(3)[:16], reference(9)[:16]]
    result = run_engine(m.model, [[request(p, 60) for p in prompts]], memory=section)
    for prompt, found in zip(prompts, result["rounds"][0], strict=True):
        assert found["tokens"] == m.with_plan(prompt, [Attachment(*p) for p in seen(found)], 60)
    assert any("no free pages" in found["memory"].get("refresh", "") for found in result["rounds"][0])


def test_what_cannot_be_refreshed_is_said(memory_bench):
    m = memory_bench
    section = m.section(m.references, retrieval={"top_k": 1, "every": 8})
    result = run_engine(m.model, [[request(PROMPTS[1], 20, stop=["never"])]], memory=section)
    assert result["rounds"][0][0]["memory"]["refresh"] == "off: stop strings" and len(tokens(result)[0]) == 20


@pytest.mark.parametrize("which", ["prefixes", "references"])
def test_the_triton_kernels_in_the_worker(memory_bench, which):
    """The fused kernel, interpreted, where the CPU worker would run torch."""
    m, (short, middle, *_) = memory_bench, PROMPTS
    tamper = "tests.vllm_engine.tamper:memory_attention_kernels_on_cpu"
    if which == "prefixes":
        batch = [request(short, 4, **reads("beta")), request(middle, 4)]
        expected = [m.after(short, "beta", count=4), m.after(middle, count=4)]
    else:
        batch = [request(short, 4, **reads("ref-1", "ref-2")), request(middle, 4)]
        expected = [m.with_plan(short, [Attachment("ref-1@1"), Attachment("ref-2@1")], 4), m.generate(middle, 4)]
    section = m.section(getattr(m, which))
    result = run_engine(m.model, [batch], memory=section, runner="v2", tamper=tamper)
    assert tokens(result) == expected and "MEMORY-KERNELS" in result["output"]
