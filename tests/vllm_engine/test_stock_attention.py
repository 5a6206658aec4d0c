"""Memory is added to vLLM's own attention: without memory in the step, and where it has none, nothing is changed."""

from __future__ import annotations

import pytest

from tests.support.memory_scenarios import PROMPTS, ask
from tests.vllm_engine.engine import run_engine

pytestmark = pytest.mark.engine


def rounds(*names: str) -> list[list[dict]]:
    """Prefill in chunks, steps of prefill and decode together, and decoding; log-probabilities of every token."""
    first = [ask(p, n, *names) for p, n in zip(PROMPTS, (3, 9, 14, 20), strict=True)]
    second = [ask(p[::-1], 8, *names) for p in PROMPTS]
    return [[request | {"logprobs": 3} for request in batch] for batch in (first, second)]


def answers(result: dict) -> list:
    return [(one["tokens"], one["logprobs"]) for batch in result["rounds"] for one in batch]


@pytest.fixture(scope="module")
def stock(memory_bench):
    return answers(run_engine(memory_bench.model, rounds(), dtype="bfloat16"))


def test_a_bank_that_nobody_reads_leaves_every_bit_as_it_is(memory_bench, stock):
    section = memory_bench.section()
    assert answers(run_engine(memory_bench.model, rounds(), memory=section, dtype="bfloat16")) == stock


def test_attention_of_our_own_would_be_seen(memory_bench, stock):
    """Negative control: the same rows without memory, attended by our kernels."""
    section = memory_bench.section() | {"deterministic": True}
    result = run_engine(memory_bench.model, rounds(), memory=section, dtype="bfloat16")
    assert answers(result) != stock
