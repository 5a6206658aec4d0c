"""Sessions on real SGLang: a state that outlives its request, against transformers that carries the state over."""

from __future__ import annotations

import pytest

from tests.sglang_engine.engine import request, run_engine, tokens
from tests.support import session_scenarios as scenarios

pytestmark = pytest.mark.engine

WAYS = {
    "default": {},
    "page_of_one_token": {"page_size": 1},
    "no_overlap": {"disable_overlap_schedule": True},
    "tensor_parallel": {"tp_size": 2},
    "pipeline_parallel": {"pp_size": 2},
}


def words(name: str, **more: int) -> dict:
    return {"words": {"mem_session": name, **more}}


@pytest.mark.parametrize("way", WAYS)
def test_sessions_carry_their_state_over(bench, prompts, tmp_path, way):
    scenarios.sessions_carry_their_state_over(
        bench, prompts, run_engine, tmp_path, WAYS[way].get("page_size", 16), **WAYS[way]
    )


def test_without_memory_in_the_radix_keys_tokens_are_wrong(bench, prompts):
    """Negative control: the same text under two memories must not share KV."""
    rounds = [[request(prompts[2], **words("alice"))], [request(prompts[2], **words("alice"))]]
    bench.forget()
    expected = [bench.generate(prompts[2]), bench.generate(prompts[2])]
    right = run_engine(bench.model, rounds, memory=bench.memory)
    assert [tokens(right, r)[0] for r in (0, 1)] == expected
    wrong = run_engine(
        bench.model, rounds, memory=bench.memory, tamper="tests.sglang_engine.tamper:no_memory_in_radix_keys"
    )
    assert tokens(wrong, 0)[0] == expected[0] and tokens(wrong, 1)[0] != expected[1]


def test_flags_and_refusals_of_one_request(bench, prompts):
    """Reset, frozen zero state, a busy session, and what an error leaves behind."""
    first, second = prompts[0], prompts[1]
    result = run_engine(
        bench.model,
        [
            [request(first, **words("alice"))],
            [request(second, **words("alice")), request(second, **words("alice"))],
            [request(second, **words("alice"))],
            [request(first, **words("alice", mem_reset=1))],
            [request(second, **words("alice"))],
            [request(first, words={"mem_write": 0})],
            [request(first, words={"mem_sessoin": "alice"})],
            [request(first, words={"mem_triton": "forged"})],
        ],
        memory=bench.memory, errors_are_results=True,
    )  # fmt: skip
    rounds = result["rounds"]
    assert '"alice" is being written' in rounds[1]["error"]
    bench.forget()
    bench.generate(first)
    assert tokens(result, 2) == [bench.generate(second)], "the refused pair committed nothing and holds nothing"
    bench.forget()
    assert [tokens(result, r)[0] for r in (3, 4)] == [bench.generate(first), bench.generate(second)]
    stock = run_engine(bench.model, [[request(first)]])
    assert tokens(result, 5) == tokens(stock), "a frozen zero state is the plain model"
    assert 'Did you mean "mem_session"' in rounds[6]["error"] and "reserved" in rounds[7]["error"]


@pytest.mark.parametrize("tamper", ["", "tests.support.controls:one_last_state_only"])
def test_a_stop_token_is_not_part_of_the_state(bench, prompts, tamper):
    """Overlap scheduling, SGLang's default, runs one step past it."""
    scenarios.a_stop_token_is_not_part_of_the_state(bench, prompts, run_engine, tamper)
