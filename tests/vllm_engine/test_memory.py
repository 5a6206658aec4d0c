"""Explicit memory on real vLLM: the right memory for every row, whatever the engine does with it meanwhile."""

from __future__ import annotations

import pytest

from mem_triton.systems.explicit.searches import Found
from mem_triton.systems.payload import decode
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_bench import SECRET
from tests.support.memory_scenarios import PROMPTS, ask
from tests.vllm_engine.engine import run_engine, ways

pytestmark = pytest.mark.engine

BLOCK = 32
RUNNERS = {
    "v1": {},
    "v2": {"runner": "v2"},
    "v2-async": {"runner": "v2", "force_async": True},
    "v1-tp2": {"tensor_parallel_size": 2},
    "v2-pp2": {"runner": "v2", "pipeline_parallel_size": 2, "env": {"TORCHDYNAMO_DISABLE": "1"}},
    "v1-compiled": {"enforce_eager": False},
}
TAMPER = "tests.vllm_engine.tamper"


@pytest.mark.parametrize("runner", ways(RUNNERS, soak="v2 v1-compiled v2-pp2"))
def test_b6_b10_every_row_has_its_own_memory(memory_bench, runner):
    scenarios.every_row_has_its_own_memory(memory_bench, run_engine, BLOCK, **RUNNERS[runner])


def test_fault28_an_entry_that_cannot_be_loaded_fails_its_request_alone(memory_bench, tmp_path):
    scenarios.an_entry_that_cannot_be_loaded_fails_its_request_alone(memory_bench, run_engine, tmp_path / "bank")


def test_b10_control_without_memory_in_the_block_hash_wrong_tokens_appear(memory_bench):
    tamper = f"{TAMPER}:no_memory_in_block_keys"
    scenarios.without_memory_in_the_cache_keys_wrong_tokens_appear(memory_bench, run_engine, tamper)


@pytest.mark.parametrize("runner", ways(["v1", "v2-async"], soak="v1"))
def test_preempted_requests_read_their_memory_again(memory_bench, runner):
    b = memory_bench
    names = [("alpha",), (), ("beta",), ("gamma",), ("alpha", "beta"), ()]
    prompts = [PROMPTS[i % 4] for i in range(6)]
    batch = [ask(p, 60, *n) for p, n in zip(prompts, names, strict=True)]
    result = run_engine(
        b.model, [batch], memory=b.section(), num_gpu_blocks_override=10, max_model_len=256, **RUNNERS[runner]
    )
    assert tokens(result) == [b.after(p, *n, count=60) for p, n in zip(prompts, names, strict=True)]
    assert result["facts"]["preemptions"] > 0


def test_a_pool_too_small_for_all_serves_them_in_turn(memory_bench):
    scenarios.a_pool_too_small_for_all_serves_them_in_turn(memory_bench, run_engine)


def test_control_without_pins_eviction_breaks_a_running_request(memory_bench):
    scenarios.without_pins_eviction_breaks_a_running_request(memory_bench, run_engine, "tests.support.controls:no_pins")


def test_fault04_every_answer_of_several_comes_whole_from_python(memory_bench):
    scenarios.every_answer_of_several_comes_whole(memory_bench, run_engine)


def test_sparse_references_beside_a_constant_prefix(memory_bench):
    scenarios.sparse_references_beside_a_constant_prefix(memory_bench, run_engine)


@pytest.mark.parametrize("pool_dtype", ways(["int8", "fp8"], soak="fp8"))
def test_smaller_pages_are_read_as_what_they_hold(memory_bench, pool_dtype):
    scenarios.smaller_pages_are_read_as_what_they_hold(memory_bench, run_engine, pool_dtype)


@pytest.mark.parametrize("runner", ways(["v1", "v2", "v1-tp2"], soak="v1 v1-tp2"))
def test_a_prompt_is_captured_and_read_again(memory_bench, runner):
    result = scenarios.a_prompt_is_captured_and_read_again(
        memory_bench, run_engine, f"note-{runner}", **RUNNERS[runner]
    )
    assert result["rounds"][2][0]["cached"] == 2 * BLOCK


def test_fault14_a_bank_of_another_dtype_is_read_and_written_with_a_warning(memory_bench):
    scenarios.a_bank_of_another_dtype_is_read_and_written_with_a_warning(memory_bench, run_engine)


def test_a_capture_of_the_wrong_tokens_would_be_seen(memory_bench):
    """Negative control: the copy is of other blocks."""
    tamper = f"{TAMPER}:captures_of_other_blocks"
    scenarios.a_capture_of_the_wrong_tokens_would_be_seen(memory_bench, run_engine, tamper)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_ids": ["nobody"]}, "nobody"),
        ({"mem_ids": ["alpha@9"]}, "alpha@9"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": ["cold"]}, "no keys and values yet"),
        ({"mem_top_k": 3}, "mem_triton.memory.retrieval"),
        ({"mem_session": "alice"}, "configured without mem_triton.delta"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_scheduled(front_end, fields, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        front_end.open_request({"prompt_token_ids": [1, 2]}, SamplingParams(extra_args=fields))


def retrieve(explicit, reading, prompt_ids):
    """Complete a plan as an engine does, without its thread."""
    explicit.attach(reading, prompt_ids, Found(explicit.find(reading, prompt_ids)))


def test_a_tenant_reads_its_own_and_what_is_public(front_end):
    from vllm import SamplingParams

    for ids in ([SECRET], ["alpha"], [SECRET, "beta"]):
        opened = front_end.open_request([1], SamplingParams(extra_args={"mem_ids": ids, "mem_tenant": "acme"}))
        assert [a.ref for a in opened.parts["memory"].plan] == [f"{i}@1" for i in ids]


def test_fault15_memory_beyond_the_models_context_is_refused_and_the_answer_ends_within_it(memory_bench):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    front = front_end_of(memory_bench.model, memory_bench.section(), max_model_len=96)

    def opened(prompt: int, *ids: str):
        params = SamplingParams(extra_args={"mem_ids": list(ids)}, max_tokens=90)
        return front.open_request({"prompt_token_ids": [5] * prompt}, params), params

    for ids, prompt, numbers in (
        (["delta"], 4, "101 tokens.*96 tokens"),
        (["alpha"], 56, "40 tokens.*of 56.*96 tokens"),
    ):
        with pytest.raises(VLLMValidationError, match=numbers):
            opened(prompt, *ids)
    asked, params = opened(50, "alpha")
    retrieve(front.parts["memory"], asked.parts["memory"], [5] * 50)
    assert front.cut_answer(asked, [5] * 50, params).params().max_tokens == 96 - 50 - 40
    assert "memory takes 40 of 96" in asked.report()["context"]


def test_fault15_default_entries_beyond_the_models_context_are_refused_at_start(memory_bench):
    from mem_triton.config import ConfigError

    with pytest.raises(ConfigError, match=r"memory\.default: the entries have 101 tokens.*context of 96 tokens"):
        front_end_of(memory_bench.model, memory_bench.section(default=["delta"]), max_model_len=96)


def test_fault15_fewer_references_are_retrieved_where_the_context_has_no_room(memory_bench):
    section = memory_bench.section(memory_bench.references, retrieval={"top_k": 4, "every": 32})
    front = front_end_of(memory_bench.model, section, max_model_len=64)
    for prompt, seen in ((20, 4), (46, 2), (62, 0)):
        reading = front.open_request({"prompt_token_ids": [5] * prompt}, params_of()).parts["memory"]
        retrieve(front.parts["memory"], reading, [5] * prompt)
        assert len({a.ref for a in reading.plan if a.end > prompt}) == seen, "references keep 8 tokens each"
        assert ("context of 64 tokens" in reading.report().get("retrieval", "")) == (seen < 4)


def test_fault06_entries_that_are_named_switch_retrieval_off_and_the_answer_says_so(memory_bench):
    section = memory_bench.section(memory_bench.references, retrieval={"top_k": 2, "every": 32})
    front = front_end_of(memory_bench.model, section)
    reading = front.open_request([5] * 9, params_of(mem_ids=["ref-5"])).parts["memory"]
    retrieve(front.parts["memory"], reading, [5] * 9)
    assert [a.ref for a in reading.plan] == ["ref-5@1"] and "mem_top_k" in reading.report()["retrieval"]
    reading = front.open_request([5] * 9, params_of(mem_ids=["ref-5"], mem_top_k=2)).parts["memory"]
    retrieve(front.parts["memory"], reading, [5] * 9)
    assert len(reading.plan) == 3 and "retrieval" not in reading.report(), "both, when both are said"


def test_fault24_the_last_user_message_is_what_vllm_searches_for(memory_bench):
    from tests.support.models import tiny_tokenizer

    section = memory_bench.section(memory_bench.references, retrieval={"top_k": 1, "every": 64})
    front = front_end_of(memory_bench.model, section, tokenizer=tiny_tokenizer)
    tokenizer, searched = tiny_tokenizer(), []
    front.parts["memory"].retriever._search = lambda text, *rest: searched.append(text) or []
    chat = [("system", "Be brief. " * 30), ("user", "Hello"), ("assistant", "Hi."), ("user", "Who has the key?")]
    messages = [{"role": role, "content": text} for role, text in chat]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    reading = front.open_request({"prompt_token_ids": ids}, params_of()).parts["memory"]
    retrieve(front.parts["memory"], reading, ids)
    assert searched[-1] == "Who has the key?" and len(searched) > 3


def test_fault27_prompt_embeddings_are_refused_by_name_where_memory_would_be_read(front_end):
    import torch
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    embeds = {"type": "embeds", "prompt_embeds": torch.zeros(3, 8)}
    front_end.parts["memory"]._default, kept = ("alpha@1",), front_end.parts["memory"]._default
    try:
        for fields in (None, {"mem_ids": ["beta"]}, {"mem_capture": "x"}):
            with pytest.raises(VLLMValidationError, match="prompts given as embeddings cannot use explicit memory"):
                front_end.open_request(embeds, SamplingParams(extra_args=fields))
        opened = front_end.open_request(embeds, SamplingParams(extra_args={"mem_ids": []}))
        assert "memory" not in opened.parts, "without memory they are served"
    finally:
        front_end.parts["memory"]._default = kept


def test_fault27_a_prompt_that_reaches_the_engine_unrendered_is_rendered_as_vllm_does(front_end):
    from types import SimpleNamespace as Engine

    from mem_triton_vllm.front_end import prompt_ids_of

    seen = []
    renderer = Engine(
        default_cmpl_tok_params="tok", render_cmpl=lambda prompts, params: seen.append(prompts) or prompts
    )
    engine = Engine(model_config=Engine(is_encoder_decoder=False), renderer=renderer)
    prompt_ids_of(engine, "who has the key?")
    assert seen == [[{"prompt": "who has the key?"}]]


def test_fault06_fields_of_a_rendered_engine_request_are_those_that_vllm_runs(front_end):
    """vLLM takes the parameters inside such a request and not those beside it."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import EngineCoreRequest

    def request(**fields):
        params = SamplingParams(extra_args=fields)
        return EngineCoreRequest("r", [1, 2], None, params, None, 0.0, None, None, None)

    with pytest.raises(VLLMValidationError, match="nobody"):
        front_end.open_request(request(mem_ids=["nobody"]), SamplingParams())
    asked = request(mem_ids=["alpha"])
    opened = front_end.open_request(asked, SamplingParams())
    prompt, _ = front_end.carry(asked, asked.sampling_params, opened)
    payload = decode(prompt.sampling_params.extra_args["mem_triton"])
    assert payload.systems["memory"].segments[0].ref == "alpha@1"
    assert "mem_triton" not in asked.sampling_params.extra_args, "the caller's own is untouched"


def params_of(**fields):
    from vllm import SamplingParams

    return SamplingParams(extra_args=fields or None)


def front_end_of(model, section, tokenizer=None, max_model_len=512):
    """A server's front end without its engine. tokenizer: makes the model's."""
    from vllm.engine.arg_utils import EngineArgs

    from mem_triton_vllm.engines import _front_end
    from mem_triton_vllm.refusals import section_of

    config = EngineArgs(
        model=str(model),
        load_format="mem_triton",
        dtype="float32",
        max_model_len=max_model_len,
        additional_config={"mem_triton": section},
    ).create_engine_config()
    return _front_end(config, section_of(config), tokenizer().decode if tokenizer else str, tokenizer)


@pytest.fixture(scope="module")
def front_end(memory_bench):
    """The front end of a server of the prefix bank, without its engine."""
    return front_end_of(memory_bench.model, memory_bench.section())
