"""Sessions on real SGLang: a state that outlives its request, against transformers that carries the state over."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from tests.sglang_engine.engine import request, run_engine, tokens

pytestmark = pytest.mark.engine

NAMES = ["alice", "bob", "carol", "dave"]
WAYS = {
    "default": {},
    "page_of_one_token": {"page_size": 1},
    "no_overlap": {"disable_overlap_schedule": True},
    "tensor_parallel": {"tp_size": 2},
}
CACHED = {"page_of_one_token": [6, 29, 149, 64]}


def words(name: str, **more: int) -> dict:
    return {"words": {"mem_session": name, **more}}


@pytest.mark.parametrize("way", WAYS)
def test_sessions_carry_their_state_over(bench, prompts, tmp_path, way):
    """Four sessions at once: tell, tell again, ask twice without writing (the second time from the radix cache)."""
    again = prompts[::-1]
    result = run_engine(
        bench.model,
        [
            [request(p, **words(n)) for p, n in zip(prompts, NAMES, strict=True)],
            [request(p, **words(n)) for p, n in zip(again, NAMES, strict=True)],
            [request(p, **words(n, mem_write=0)) for p, n in zip(prompts, NAMES, strict=True)],
            [request(p, **words(n, mem_write=0)) for p, n in zip(prompts, NAMES, strict=True)],
            [request(p) for p in prompts],
        ],
        memory={**bench.memory, "session_dir": str(tmp_path / "sessions")}, **WAYS[way],
    )  # fmt: skip
    fresh = []
    for i in range(4):
        bench.forget()
        told, told_again = bench.generate(prompts[i]), bench.generate(again[i])
        asked = bench.generate(prompts[i], write=False)
        assert [tokens(result, r)[i] for r in range(4)] == [told, told_again, asked, asked]
        assert told != asked, "the state changes the answer"
        fresh.append(told)
    assert tokens(result, 4) == fresh, "a request without a session starts from zeros"
    cached = [[answer["cached"] for answer in answers] for answers in result["rounds"]]
    assert cached[3] == CACHED.get(way, [0, 16, 144, 64]), "the same version shares its prefix"
    assert cached[1] == cached[2] == cached[4] == [0, 0, 0, 0], "another version, or none, does not"
    with safe_open(tmp_path / "sessions" / "alice.safetensors", "pt") as file:
        header = file.metadata()
        assert (header["session"], header["version"]) == ("alice", "2")
        assert int(header["tokens"]) == sum(len(p) + 12 - 1 for p in (prompts[0], again[0])), "the last is never fed"
        assert sorted(file.keys()) == [f"model.layers.{i}.self_attn" for i in range(2)]


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


@pytest.mark.parametrize("tamper", ["", "tests.sglang_engine.tamper_sessions:one_last_state_only"])
def test_a_stop_token_is_not_part_of_the_state(bench, prompts, tamper):
    """Overlap scheduling runs one step past a stop token. The committed state must not have seen it (negative control:
    a table that keeps only the newest state)."""
    bench.forget()
    whole = bench.generate(prompts[1], 12)
    stop = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    bench.forget()
    bench.generate(prompts[1], stop + 1)
    expected = bench.generate(prompts[0])
    result = run_engine(
        bench.model,
        [
            [request(prompts[1], stop_token_ids=[whole[stop]], **words("alice"))],
            [request(prompts[0], **words("alice"))],
        ],
        memory=bench.memory, tamper=tamper,
    )  # fmt: skip
    assert result["facts"]["overlap"]
    assert tokens(result, 0) == [whole[: stop + 1]]
    assert (tokens(result, 1) == [expected]) is (tamper == "")
