"""Explicit memory on real vLLM: the right memory for every row, whatever the engine does with it meanwhile.

An entry of a prefix bank is text before the prompt, so transformers with that text in the prompt is the oracle, and it
knows nothing of memory. Several entries, and sparse references, are checked against ``mem_triton_transformers``.
"""

from __future__ import annotations

import pytest

from mem_triton.store.plan import Attachment
from tests.support.memory_bench import SECRET, MemoryBench, make_memory_bench, tokens_of
from tests.vllm_engine.engine import request, run_engine, tokens

pytestmark = pytest.mark.engine

PROMPTS = [tokens_of(i, n) for i, n in enumerate((7, 30, 150, 65))]
RUNNERS = {
    "v1": {},
    "v2": {"runner": "v2"},
    "v2-async": {"runner": "v2", "force_async": True},
    "v1-tp2": {"tensor_parallel_size": 2},
    "v2-pp2": {"runner": "v2", "pipeline_parallel_size": 2, "env": {"TORCHDYNAMO_DISABLE": "1"}},
    "v1-compiled": {"enforce_eager": False},
}


@pytest.fixture(scope="session")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


def reads(*ids: str, **words) -> dict:
    return {"extra_args": {"mem_ids": list(ids), **words}}


@pytest.mark.parametrize("runner", RUNNERS)
def test_b6_b10_every_row_has_its_own_memory(memory_bench, runner):
    """Mixed batches, chunked prefill, prefix-cache hits of the same memory and none of another's."""
    b, (short, middle, long, edge) = memory_bench, PROMPTS
    first = [
        request(short, **reads("alpha")),
        request(middle),
        request(long, **reads("beta")),
        request(edge, **reads("alpha")),
    ]
    other = [request(short, **reads("beta")), request(short), request(long, **reads("alpha", "gamma")), request(long)]
    result = run_engine(b.model, [first, first, other], memory=b.section(), **RUNNERS[runner])
    expected = [b.after(short, "alpha"), b.after(middle), b.after(long, "beta"), b.after(edge, "alpha")]
    assert tokens(result, 0) == expected and tokens(result, 1) == expected
    assert [a["cached"] for a in result["rounds"][1]] == [0, 0, 128, 64], "the same memory shares its blocks"
    assert tokens(result, 2) == [b.after(short, "beta"), b.after(short), b.after(long, "alpha", "gamma"), b.after(long)]
    assert [a["cached"] for a in result["rounds"][2]] == [0] * 4, "another memory, or none, shares nothing"
    assert expected[0] != b.after(short) and expected[2] != b.after(long), "memory matters"


def test_b10_control_without_memory_in_the_block_hash_wrong_tokens_appear(memory_bench):
    b, long = memory_bench, PROMPTS[2]
    rounds = [[request(long, **reads("alpha"))], [request(long, **reads("beta"))]]
    result = run_engine(b.model, rounds, memory=b.section(), tamper="tests.vllm_engine.tamper:no_memory_in_block_keys")
    assert tokens(result, 0) == [b.after(long, "alpha")]
    assert tokens(result, 1) != [b.after(long, "beta")], "another memory's KV was read"


@pytest.mark.parametrize("runner", ["v1", "v2-async"])
def test_preempted_requests_read_their_memory_again(memory_bench, runner):
    b = memory_bench
    names = [("alpha",), (), ("beta",), ("gamma",), ("alpha", "beta"), ()]
    prompts = [PROMPTS[i % 4] for i in range(6)]
    batch = [request(p, 60, **(reads(*n) if n else {})) for p, n in zip(prompts, names, strict=True)]
    result = run_engine(
        b.model, [batch], memory=b.section(), num_gpu_blocks_override=14, max_model_len=256, **RUNNERS[runner]
    )
    assert tokens(result) == [b.after(p, *n, count=60) for p, n in zip(prompts, names, strict=True)]
    assert result["facts"]["preemptions"] > 0


def test_a_pool_too_small_for_all_serves_them_in_turn(memory_bench):
    """Three pages: alpha takes them all, so the requests wait for one another, and none reads another's pages."""
    b = memory_bench
    names = [("alpha", "beta", "gamma")[i % 3] for i in range(7)]
    batch = [request(PROMPTS[i % 4], **reads(n)) for i, n in enumerate(names)]
    result = run_engine(b.model, [batch], memory=three_pages(b))
    assert tokens(result) == [b.after(PROMPTS[i % 4], n) for i, n in enumerate(names)]


def test_control_without_pins_eviction_breaks_a_running_request(memory_bench):
    b = memory_bench
    batch = [request(PROMPTS[0], 40, **reads("alpha")), request(PROMPTS[1], 40, **reads("beta"))]
    expected = [b.after(PROMPTS[0], "alpha", count=40), b.after(PROMPTS[1], "beta", count=40)]
    assert tokens(run_engine(b.model, [batch], memory=three_pages(b))) == expected
    broken = run_engine(b.model, [batch], memory=three_pages(b), tamper="tests.vllm_engine.tamper:no_pins")
    assert tokens(broken) != expected


def three_pages(b: MemoryBench) -> dict:
    page = 2 * 2 * 16 * 2 * 32 * 4  # layers, KV heads, tokens, K and V, head size, fp32
    return b.section(pool_gib=3.5 * page / 2**30)


def test_sparse_references_beside_a_constant_prefix(memory_bench):
    b, (short, _, long, edge) = memory_bench, PROMPTS
    batch = [
        request(short, **reads("ref-0")), request(long, **reads(*(f"ref-{i}" for i in range(5)))), request(edge),
        request(edge, **reads("ref-7", "ref-3")),
    ]  # fmt: skip
    result = run_engine(b.model, [batch], memory=b.section(b.references))

    def plan(*numbers: int) -> list[Attachment]:
        return [Attachment(f"ref-{i}@1") for i in numbers]

    expected = [
        b.with_plan(short, plan(0)), b.with_plan(long, plan(*range(5))), b.generate(edge), b.with_plan(edge, plan(7, 3))
    ]  # fmt: skip
    assert tokens(result) == expected
    assert expected[3] != expected[2]


def test_a_prompt_is_captured_and_read_again(memory_bench):
    b, text = memory_bench, tokens_of(50, 70)
    rounds = [
        [request(text, extra_args={"mem_capture": "note"}), request(PROMPTS[1])],
        [request(PROMPTS[0], **reads("note")), request(text[:20], **reads("note@1"))],
        [request(text[:33], extra_args={"mem_capture": "note"})],
        [request(PROMPTS[0], **reads("note")), request(PROMPTS[0], **reads("note@1"))],
    ]
    result = run_engine(b.model, rounds, memory=b.section())
    assert result["rounds"][0][0]["memory"]["capture"] == {"id": "note@1"}
    assert tokens(result, 1) == [b.generate(text + PROMPTS[0]), b.generate(text + text[:20])]
    assert result["rounds"][2][0]["memory"]["capture"] == {"id": "note@2"}
    assert tokens(result, 3) == [b.generate(text[:33] + PROMPTS[0]), b.generate(text + PROMPTS[0])]


def test_tensor_parallel_ranks_capture_their_heads(memory_bench):
    b, text = memory_bench, tokens_of(51, 45)
    rounds = [[request(text, extra_args={"mem_capture": "tp"})], [request(PROMPTS[0], **reads("tp"))]]
    result = run_engine(b.model, rounds, memory=b.section(), tensor_parallel_size=2)
    assert tokens(result, 1) == [b.generate(text + PROMPTS[0])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mem_ids": ["nobody"]}, "nobody"),
        ({"mem_ids": ["alpha@9"]}, "alpha@9"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": ["cold"]}, "no keys and values yet"),
        ({"mem_top_k": 3}, "mem_triton.memory.retrieval"),
        ({"mem_session": "alice"}, "configured without mem_triton.delta"),
    ],
)
def test_bad_words_are_refused_before_anything_is_scheduled(front_end, words, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        front_end.open_request({"prompt_token_ids": [1, 2]}, SamplingParams(extra_args=words))


def test_a_tenant_reads_its_own_and_what_is_public(front_end):
    from vllm import SamplingParams

    for ids in ([SECRET], ["alpha"], [SECRET, "beta"]):
        opened = front_end.open_request([1], SamplingParams(extra_args={"mem_ids": ids, "mem_tenant": "acme"}))
        assert [a.ref for a in opened.reading.plan] == [f"{i}@1" for i in ids]


@pytest.fixture(scope="module")
def front_end(memory_bench):
    """The front end of a server of the prefix bank, without its engine."""
    from vllm.engine.arg_utils import EngineArgs

    from mem_triton_vllm.front_end import _front_end
    from mem_triton_vllm.refusals import section_of

    config = EngineArgs(
        model=str(memory_bench.model), load_format="mem_triton", dtype="float32", max_model_len=512,
        additional_config={"mem_triton": memory_bench.section()},
    ).create_engine_config()  # fmt: skip
    return _front_end(config, section_of(config), decode=str)
