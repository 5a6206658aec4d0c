"""What every engine must do with sessions, written once: a state that outlives its request, against transformers that
carries the state over. run: an engine's ``run_engine``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.bench import Bench
from tests.support.cases import cached, tokens
from tests.support.memory_scenarios import Run, ask, whole_pages

NAMES = ["alice", "bob", "carol", "dave"]


def sessions_carry_their_state_over(
    bench: Bench, prompts: list[list[int]], run: Run, folder: Path, page: int, **options: Any
) -> None:
    """Four sessions at once: tell, tell again, ask twice without writing (the second time from the prefix cache)."""
    again = prompts[::-1]

    def each(texts: list[list[int]], **more: int) -> list[dict[str, Any]]:
        return [ask(p, mem_session=n, **more) for p, n in zip(texts, NAMES, strict=True)]

    rounds = [
        each(prompts),
        each(again),
        each(prompts, mem_write=0),
        each(prompts, mem_write=0),
        list(map(ask, prompts)),
    ]
    result = run(bench.model, rounds, memory={**bench.memory, "session_dir": str(folder / "sessions")}, **options)
    fresh = []
    for i in range(4):
        bench.forget()
        told, told_again = bench.generate(prompts[i]), bench.generate(again[i])
        answer = bench.generate(prompts[i], write=False)
        assert [tokens(result, r)[i] for r in range(4)] == [told, told_again, answer, answer]
        assert told != answer, "the state changes the answer"
        fresh.append(told)
    assert tokens(result, 4) == fresh, "a request without a session starts from zeros"
    assert cached(result, 3) == [whole_pages(p, page) for p in prompts], "the same version shares its prefix"
    assert all(cached(result, r) == [0, 0, 0, 0] for r in (1, 2, 4)), "another version, or none, does not"
    with safe_open(folder / "sessions" / "alice.safetensors", "pt") as file:
        header = file.metadata()
        assert (header["session"], header["version"]) == ("alice", "2")
        assert int(header["tokens"]) == sum(len(p) + 12 - 1 for p in (prompts[0], again[0])), "the last is never fed"
        assert sorted(file.keys()) == [f"model.layers.{i}.self_attn" for i in range(2)]


def sessions_belong_to_the_model_as_it_was_computed(
    bench: Bench, prompts: list[list[int]], run: Run, folder: Path, overrides: dict[str, Any]
) -> None:
    """A server with another RoPE on the same directory refuses them. overrides: the option that says so."""
    memory = {**bench.memory, "session_dir": str(folder)}
    run(bench.model, [[ask(prompts[0], mem_session="alice")]], memory=memory)
    with safe_open(folder / "alice.safetensors", "pt") as file:
        said = json.loads(file.metadata()["served"])
    assert sorted(said) == ["dtype", "quantization", "rope", "weights"] and said["dtype"] == "float32"
    rounds = [[ask(prompts[0], mem_session="alice")], [ask(prompts[0], mem_session="bob")]]
    result = run(bench.model, rounds, memory=memory, errors_are_results=True, **overrides)
    error = result["rounds"][0]["error"]
    assert "was made with another rope" in error and '"mem_reset": 1' in error, error
    assert len(tokens(result, 1)[0]) == 12, "other sessions are served"


def an_overwritten_lora_is_another_one_when_it_is_loaded(
    lora_bench: Bench, prompts: list[list[int]], run: Run, page: int, folder: Path, **options: Any
) -> None:
    """Its files change under a running engine: sessions and prefixes stay those of the weights that answer, until the
    engine reads the new files. folder: where the adapter lies."""
    told, asked, long, _ = prompts
    other = _two_loras(lora_bench, folder)

    def with_lora(*requests: dict[str, Any], **before: Any) -> list[dict[str, Any]]:
        return [{**request, "lora": str(folder), **before} for request in requests]

    rounds = [
        with_lora(ask(told, mem_session="alice"), ask(long)),
        with_lora(ask(asked, mem_session="alice"), ask(long), overwrite=str(other)),
        with_lora(ask(long), reload=True),
        with_lora(ask(told, mem_session="alice")),
    ]
    result = run(lora_bench.model, rounds, memory=lora_bench.memory, errors_are_results=True, **options)
    fresh = lora_bench.fresh(long)
    assert tokens(result, 0) == [lora_bench.fresh(told), fresh]
    assert tokens(result, 1) == [lora_bench.generate(asked), fresh], "the weights that were loaded"
    assert cached(result, 1)[1] == whole_pages(long, page), "and their prefixes"
    assert cached(result, 2) == [0] and tokens(result, 2) != [fresh], "the new weights find nothing of the old ones'"
    assert '"alice" was told under LoRA adapter' in result["rounds"][3]["error"]


def a_lora_that_changes_behind_an_admission_is_the_one_that_was_admitted(
    lora_bench: Bench, prompts: list[list[int]], run: Run, folder: Path, tamper: str = "", **options: Any
) -> None:
    """The request is the first to name its adapter; its files are others before the engine runs a step. What a session
    was told under them is continued under the first files by another server. tamper: a control that loads in the step.
    """
    told, asked, *_ = prompts
    other = _two_loras(lora_bench, folder)
    memory = {**lora_bench.memory, "session_dir": str(folder.with_name("sessions"))}
    alice = {"lora": str(folder), **options.pop("request", {})}
    first = [{**ask(told, mem_session="alice"), **alice, "swap": str(other)}]
    answers = [tokens(run(lora_bench.model, [first], memory=memory, tamper=tamper, **options))]
    shutil.copytree(lora_bench.lora, folder, dirs_exist_ok=True)
    then = [{**ask(asked, mem_session="alice"), **alice}]
    answers.append(tokens(run(lora_bench.model, [then], memory=memory, tamper=tamper, **options)))
    lora_bench.forget()
    right = [[lora_bench.generate(told)], [lora_bench.generate(asked)]]
    if tamper:
        assert answers[0] != right[0] and answers[1] != right[1], "told under others, continued as if it were not"
    else:
        assert answers == right


def _two_loras(lora_bench: Bench, folder: Path) -> Path:
    """The bench's LoRA adapter in ``folder``, and another one's folder."""
    shutil.copytree(lora_bench.lora, folder)
    other = shutil.copytree(lora_bench.lora, folder.with_name("other"))
    weights = {name: 2 * tensor for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(weights, other / "adapter_model.safetensors")
    return other


def without_memory_in_the_cache_keys_tokens_are_wrong(
    bench: Bench, prompts: list[list[int]], run: Run, tamper: str
) -> None:
    """The same text under two versions of a session must not share KV. tamper: a control that lets it."""
    rounds = [[ask(prompts[2], mem_session="alice")], [ask(prompts[2], mem_session="alice")]]
    bench.forget()
    expected = [[bench.generate(prompts[2])], [bench.generate(prompts[2])]]
    right = run(bench.model, rounds, memory=bench.memory)
    assert [tokens(right, r) for r in (0, 1)] == expected
    wrong = run(bench.model, rounds, memory=bench.memory, tamper=tamper)
    assert tokens(wrong, 0) == expected[0] and tokens(wrong, 1) != expected[1]


def flags_and_refusals_of_one_request(bench: Bench, prompts: list[list[int]], run: Run) -> None:
    """Reset, frozen zero state, a busy session, and what an error leaves behind."""
    first, second, *_ = prompts
    rounds = [
        [ask(first, mem_session="alice")],
        [ask(second, mem_session="alice"), ask(second, mem_session="alice")],
        [ask(second, mem_session="alice")],
        [ask(first, mem_session="alice", mem_reset=1)],
        [ask(second, mem_session="alice")],
        [ask(first, mem_write=0)],
        [ask(first, mem_sessoin="alice")],
        [ask(first, mem_triton="forged")],
        [ask(first, mem_session="alice", mem_read=0)],
        [ask(first, mem_session="alice", mem_write=0)],
    ]
    result = run(bench.model, rounds, memory=bench.memory, errors_are_results=True)
    errors = {index: answer["error"] for index, answer in enumerate(result["rounds"]) if "error" in answer}
    assert list(errors) == [1, 6, 7]
    assert '"alice" is being written' in errors[1]
    assert 'Did you mean "mem_session"' in errors[6] and "reserved" in errors[7]
    bench.forget()
    bench.generate(first)
    assert tokens(result, 2) == [bench.generate(second)], "the refused pair committed nothing and holds nothing"
    bench.forget()
    assert [tokens(result, r)[0] for r in (3, 4)] == [bench.generate(first), bench.generate(second)]
    stock = run(bench.model, [[ask(first)]])
    assert tokens(result, 5) == tokens(stock), "a frozen zero state is the plain model"
    assert tokens(result, 8) == tokens(stock), "and so is a session that is not read"
    assert tokens(result, 9) == [bench.generate(first, write=False)], "which it left as it was"


def a_scope_of_sessions_leaves_plain_requests_to_the_engine(
    bench: Bench, prompts: list[list[int]], run: Run, page: int, memory: dict[str, Any], wired: str, **options: Any
) -> str:
    """Plain rows beside sessions' rows, cold and from the prefix cache, get what the stock engine gives, log
    probabilities included where the engine's case tells them; requests override it both ways.

    wired: a tamper that wires memory as on a GPU. Returns what the engine printed.
    """
    first, short, long, last = prompts

    def round_of(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
        plain = [ask(long), ask(short)]
        return [{**request, "logprobs": 5} for request in (one, *plain, other)]

    fields = [
        ({"mem_session": "alice"}, {"mem_session": "bob"}),
        ({"mem_session": "alice", "mem_read": 0}, {"mem_session": "bob", "mem_write": 0}),
        ({"mem_read": 1}, {"mem_session": "alice"}),
    ]
    served = run(
        bench.model,
        [round_of(ask(first, **a), ask(last, **b)) for a, b in fields],
        memory=memory,
        tamper=wired,
        **options,
    )
    stock = run(bench.model, [round_of(ask(first), ask(last)) for _ in fields], **options)
    fresh = [bench.fresh(p) for p in prompts]
    for r, answers in enumerate(served["rounds"]):
        for row in (1, 2):
            own = stock["rounds"][r][row]
            assert (answers[row]["tokens"], answers[row].get("logprobs")) == (own["tokens"], own.get("logprobs"))
    assert cached(served, 1)[1:3] == [whole_pages(p, page) for p in (long, short)], "plain requests share prefixes"
    assert [fresh[2], fresh[1]] != tokens(stock)[1:3], "corrected, they would say something else"
    assert [tokens(served)[0], tokens(served)[3]] == [fresh[0], fresh[3]], "sessions are corrected"
    assert tokens(served, 1)[0] == tokens(stock)[0] != fresh[0], "not read"
    assert tokens(served, 2)[0] == fresh[0] and cached(served, 2)[0] == 0, "read without a session"
    bench.fresh(last)
    assert tokens(served, 1)[3] == bench.generate(last, write=False)
    bench.fresh(first)
    assert tokens(served, 2)[3] == bench.generate(last), "what was not read was not written"
    return served["output"]


def a_stop_token_is_not_part_of_the_state(
    bench: Bench, prompts: list[list[int]], run: Run, tamper: str, **options: Any
) -> None:
    """Engines that schedule ahead run one step past a stop token; the committed state must not have seen it.

    tamper: "", or a control that keeps only the newest state.
    """
    bench.forget()
    whole = bench.generate(prompts[1], 12)
    stop = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    bench.forget()
    bench.generate(prompts[1], stop + 1)
    expected = bench.generate(prompts[0])
    stopped = {**ask(prompts[1], mem_session="alice"), "stop_token_ids": [whole[stop]]}
    rounds = [[stopped], [ask(prompts[0], mem_session="alice")]]
    result = run(bench.model, rounds, memory=bench.memory, tamper=tamper, **options)
    assert tokens(result, 0) == [whole[: stop + 1]]
    assert (tokens(result, 1) == [expected]) is (tamper == "")
