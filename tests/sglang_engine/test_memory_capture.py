"""``mem_capture`` on real SGLang: a prompt becomes an entry, and reading it is having it before the prompt.

That is also the oracle: transformers with the captured text in the prompt, which knows nothing of memory.
"""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import run_engine
from tests.support import memory_scenarios as scenarios
from tests.support.cases import tokens
from tests.support.memory_bench import tokens_of
from tests.support.memory_scenarios import PROMPTS, ask

pytestmark = pytest.mark.engine

WAYS = {
    "default": {},
    "page_of_one_token": {"page_size": 1},
    "no_radix_cache": {"disable_radix_cache": True},
    "no_overlap": {"disable_overlap_schedule": True},
    "tensor_parallel": {"tp_size": 2},
    "pipeline_parallel": {"pp_size": 2, "disable_overlap_schedule": True},
}
EACH_TIME = ("page_of_one_token", "tensor_parallel")  # the other ways are soaks


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way not in EACH_TIME)) for way in WAYS])
def test_a_prompt_is_captured_and_read_again(memory_bench, way):
    """In chunks of 64 tokens, and with half of it out of the radix cache."""
    result = scenarios.a_prompt_is_captured_and_read_again(memory_bench, run_engine, f"note-{way}", **WAYS[way])
    assert (result["rounds"][2][0]["cached"] >= 64) == (way != "no_radix_cache")


@pytest.mark.slow
def test_prompts_captured_at_once_are_kept_apart(memory_bench):
    scenarios.prompts_captured_at_once_are_kept_apart(memory_bench, run_engine)


def test_a_retracted_request_is_kept_whole(memory_bench):
    """SGLang takes requests back from the batch at times; one that comes again has its prompt computed anew."""
    b, texts = memory_bench, [tokens_of(70 + i, 40 + 9 * i) for i in range(4)]
    rounds = [
        [ask(text, 60, mem_capture=f"back-{i}") for i, text in enumerate(texts)],
        [ask(PROMPTS[0], 12, f"capture:back-{i}") for i in range(4)],
    ]
    often = "tests.sglang_engine.tamper:retract_often"
    result = run_engine(b.model, rounds, memory=b.section(capture="own"), tamper=often)
    assert sum(answer["retractions"] for answer in result["rounds"][0]) > 0
    assert tokens(result) == [b.generate(text, 60) for text in texts]
    assert tokens(result, 1) == [b.generate(text + PROMPTS[0]) for text in texts]


def test_fault14_a_bank_of_another_dtype_is_read_and_written_with_a_warning(memory_bench):
    scenarios.a_bank_of_another_dtype_is_read_and_written_with_a_warning(memory_bench, run_engine)


def test_a_capture_of_the_wrong_tokens_would_be_seen(memory_bench):
    """Negative control: the copy is of another row of SGLang's table."""
    tamper = "tests.sglang_engine.tamper_memory:captures_of_the_next_row"
    scenarios.a_capture_of_the_wrong_tokens_would_be_seen(memory_bench, run_engine, tamper)


@pytest.mark.slow  # the front end's doing
def test_a_bank_of_references_keeps_no_prompts(memory_bench):
    b = memory_bench
    rounds = [[ask(PROMPTS[0], mem_capture="x")], [ask(PROMPTS[0])]]
    result = run_engine(b.model, rounds, memory=b.section(b.references, capture="own"), errors_are_results=True)
    error = result["rounds"][0]["error"]
    assert error.startswith("mem_capture") and 'this bank is of kind "memory3"' in error
    assert tokens(result, 1) == [b.generate(PROMPTS[0])], "the engine lives"
