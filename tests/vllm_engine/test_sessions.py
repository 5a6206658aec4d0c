"""Sessions on real vLLM: a state that outlives its request, against transformers that carries the state over."""

from __future__ import annotations

import pytest

from tests.support import session_scenarios as scenarios
from tests.vllm_engine.engine import request, run_engine, tokens, ways

pytestmark = pytest.mark.engine

WAYS = {
    "v1": {},
    "v2": {"runner": "v2"},
    "v2_async": {"runner": "v2", "force_async": True},
    "v1_tensor_parallel": {"tensor_parallel_size": 2},
    "v2_pipeline_parallel": {"runner": "v2", "pipeline_parallel_size": 2, "env": {"TORCHDYNAMO_DISABLE": "1"}},
}


def words(name: str, **more: int) -> dict:
    return {"extra_args": {"mem_session": name, **more}}


@pytest.mark.parametrize("way", ways(WAYS, soak="v2"))
def test_sessions_carry_their_state_over(bench, prompts, tmp_path, way):
    scenarios.sessions_carry_their_state_over(bench, prompts, run_engine, tmp_path, 32, **WAYS[way])


def test_sessions_survive_a_restart(bench, prompts, tmp_path):
    memory = {**bench.memory, "session_dir": str(tmp_path)}
    run_engine(bench.model, [[request(prompts[2], **words("alice"))]], memory=memory)
    result = run_engine(bench.model, [[request(prompts[3], **words("alice"))]], memory=memory, runner="v2")
    bench.forget()
    bench.generate(prompts[2])
    assert tokens(result) == [bench.generate(prompts[3])]


def test_without_memory_in_the_cache_key_tokens_are_wrong(bench, prompts):
    """Negative control: the same text under two memories must not share KV."""
    rounds = [[request(prompts[2], **words("alice"))], [request(prompts[2], **words("alice"))]]
    bench.forget()
    expected = [bench.generate(prompts[2]), bench.generate(prompts[2])]
    right = run_engine(bench.model, rounds, memory=bench.memory)
    assert [tokens(right, r)[0] for r in (0, 1)] == expected
    wrong = run_engine(
        bench.model, rounds, memory=bench.memory, tamper="tests.vllm_engine.tamper:no_memory_in_cache_keys"
    )
    assert tokens(wrong, 0)[0] == expected[0] and tokens(wrong, 1)[0] != expected[1]


def test_flags_and_refusals_of_one_request(bench, prompts):
    """Reset, frozen zero state, a busy session, and what an error leaves behind."""
    first, second = prompts[0], prompts[1]
    result = run_engine(
        bench.model,
        [
            [request(first, **words("alice"))],
            [request(second, **words("alice"), lora=None), request(second, **words("alice"))],
            [request(second, **words("alice"))],
            [request(first, **words("alice", mem_reset=1))],
            [request(second, **words("alice"))],
            [request(first, extra_args={"mem_write": 0})],
            [request(first, extra_args={"mem_sessoin": "alice"})],
            [request(first, extra_args={"mem_triton": {"lease": "forged"}})],
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
    """Async scheduling runs one step past it."""
    scenarios.a_stop_token_is_not_part_of_the_state(bench, prompts, run_engine, tamper, runner="v2", force_async=True)
