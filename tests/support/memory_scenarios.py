"""What every engine must do with explicit memory, written once: each scenario runs an engine and compares its tokens.

run: an engine's ``run_engine``. An entry of a prefix bank is text before the prompt, so transformers with that text in
the prompt is the oracle, and it knows nothing of memory. Several entries, and sparse references, are checked against
``mem_triton_transformers``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mem_triton.store.bank import Bank, NewEntry
from mem_triton.store.pool.plan import FOREVER, Attachment
from mem_triton_transformers.encode import TransformersEncoder
from mem_triton_transformers.explicit import read_plans
from tests.support.bench import Bench
from tests.support.cases import cached, tokens
from tests.support.memory_bench import MemoryBench, reference, tokens_of

Run = Callable[..., Any]
PROMPTS = [tokens_of(i, n) for i, n in enumerate((7, 30, 150, 65))]


def ask(prompt: list[int], count: int = 12, *ids: str, **fields: Any) -> dict[str, Any]:
    """A request for ``count`` tokens that reads entries."""
    if ids:
        fields["mem_ids"] = list(ids)
    return {"prompt": prompt, "max_tokens": count, **({"fields": fields} if fields else {})}


def seen(answer: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(reference, first, end) in the order of a plan, out of an answer's report."""
    parts = answer["memory"]["references"]
    return [(e["id"], p["first_token"], p["end_token"] or FOREVER) for p in parts for e in p["entries"]]


def whole_pages(prompt: list[int], page: int) -> int:
    """Tokens that a second request with the same prompt finds cached: whole pages, and never the last token."""
    return (len(prompt) - 1) // page * page


def every_row_has_its_own_memory(b: MemoryBench, run: Run, page: int, **options: Any) -> None:
    """Mixed batches, chunked prefill, prefix-cache hits of the same memory and none of another's."""
    short, middle, long, edge = PROMPTS
    first = [ask(short, 12, "alpha"), ask(middle), ask(long, 12, "beta"), ask(edge, 12, "alpha")]
    other = [ask(short, 12, "beta"), ask(short), ask(long, 12, "alpha", "gamma"), ask(long)]
    result = run(b.model, [first, first, other], memory=b.section(), **options)
    expected = [b.after(short, "alpha"), b.after(middle), b.after(long, "beta"), b.after(edge, "alpha")]
    assert tokens(result, 0) == expected and tokens(result, 1) == expected
    assert cached(result, 1) == [whole_pages(p, page) for p in PROMPTS], "the same memory shares its pages"
    assert tokens(result, 2) == [b.after(short, "beta"), b.after(short), b.after(long, "alpha", "gamma"), b.after(long)]
    assert cached(result, 2) == [0] * 4, "another memory, or none, shares nothing"
    assert expected[0] != b.after(short) and expected[2] != b.after(long), "memory matters"


def an_entry_that_cannot_be_loaded_fails_its_request_alone(b: MemoryBench, run: Run, folder: Path) -> None:
    """Its file is gone: that request fails with the entry and the reason, its neighbour and the next round do not."""
    short, middle, *_ = PROMPTS
    shutil.copytree(b.prefixes, folder)
    with Bank.open(folder, writable=True) as bank:
        bank.add([NewEntry("lonely", "a text in a file of its own", bank.load("alpha@1"))])
        sql = "SELECT s.name FROM entries e JOIN shards s USING (shard) WHERE id = ?"
        ((shard,),) = bank.catalogue.read(sql, "lonely")
    (folder / "shards" / shard).unlink()
    rounds = [[ask(short, 12, "lonely"), ask(middle)], [ask(short, 12, "alpha")]]
    result = run(b.model, rounds, memory=b.section(folder), errors_are_results=True)
    failed, plain = result["rounds"][0]
    said = json.dumps([failed["finish"], failed["memory"]])
    assert ("error" in said or "abort" in said) and "lonely@1" in said and "missing" in said, failed
    assert failed["tokens"] == [] and plain["tokens"] == b.after(middle)
    assert tokens(result, 1) == [b.after(short, "alpha")]


def sparse_references_beside_a_constant_prefix(b: MemoryBench, run: Run, **options: Any) -> None:
    short, _, long, edge = PROMPTS
    batch = [
        ask(short, 12, "ref-0"),
        ask(long, 12, *(f"ref-{i}" for i in range(5))),
        ask(edge),
        ask(edge, 12, "ref-7", "ref-3"),
    ]
    result = run(b.model, [batch], memory=b.section(b.references), **options)

    def plan(*numbers: int) -> list[Attachment]:
        return [Attachment(f"ref-{i}@1") for i in numbers]

    expected = [
        b.with_plan(short, plan(0)),
        b.with_plan(long, plan(*range(5))),
        b.generate(edge),
        b.with_plan(edge, plan(7, 3)),
    ]
    assert tokens(result) == expected
    assert expected[3] != expected[2]


def every_answer_of_several_comes_whole(b: MemoryBench, run: Run, **options: Any) -> None:
    short, middle, *_ = PROMPTS
    batch = [{**ask(short, 12, "alpha"), "n": 3}, ask(middle, 12, "beta"), {**ask(middle), "n": 2}]
    result = run(b.model, [batch], memory=b.section(default=["gamma"]), **options)
    expected = [[b.after(short, "alpha")] * 3, [b.after(middle, "beta")], [b.after(middle, "gamma")] * 2]
    assert [request["answers"] for request in result["rounds"][0]] == expected


def three_pages(b: MemoryBench, **options: Any) -> dict[str, Any]:
    """A pool that holds no more than entry alpha."""
    page = 2 * 2 * 16 * 2 * 32 * 4  # layers, KV heads, tokens, K and V, head size, fp32
    return b.section(pool_gib=3.5 * page / 2**30, **options)


def a_pool_too_small_for_all_serves_them_in_turn(b: MemoryBench, run: Run, **options: Any) -> None:
    """Three pages: alpha takes them all, so the requests wait for one another, and none reads another's pages."""
    names = [("alpha", "beta", "gamma")[i % 3] for i in range(7)]
    batch = [ask(PROMPTS[i % 4], 12, n) for i, n in enumerate(names)]
    result = run(b.model, [batch], memory=three_pages(b), **options)
    assert tokens(result) == [b.after(PROMPTS[i % 4], n) for i, n in enumerate(names)]


def without_pins_eviction_breaks_a_running_request(b: MemoryBench, run: Run, no_pins: str, **options: Any) -> None:
    batch = [ask(PROMPTS[0], 40, "alpha"), ask(PROMPTS[1], 40, "beta")]
    expected = [b.after(PROMPTS[0], "alpha", count=40), b.after(PROMPTS[1], "beta", count=40)]
    assert tokens(run(b.model, [batch], memory=three_pages(b), **options)) == expected
    broken = run(b.model, [batch], memory=three_pages(b), tamper=no_pins, errors_are_results=True, **options)
    if "error" in broken["rounds"][0]:  # the worker saw it before the request joined the batch
        assert "hold something else by now" in broken["output"]
    else:
        assert tokens(broken) != expected


def without_memory_in_the_cache_keys_wrong_tokens_appear(b: MemoryBench, run: Run, tamper: str, **options: Any) -> None:
    long = PROMPTS[2]
    rounds = [[ask(long, 12, "alpha")], [ask(long, 12, "beta")]]
    result = run(b.model, rounds, memory=b.section(), tamper=tamper, **options)
    assert tokens(result, 0) == [b.after(long, "alpha")]
    assert tokens(result, 1) != [b.after(long, "beta")], "another memory's KV was read"


def a_prompt_is_captured_and_read_again(b: MemoryBench, run: Run, id: str = "note", **options: Any) -> Any:
    """Beside a request that keeps nothing; the second time part of the prompt is cached. Returns the run's result."""
    short, middle, *_ = PROMPTS
    text, name, id = tokens_of(50, 70), id, f"capture:{id}"
    rounds = [
        [ask(text, mem_capture=name), ask(middle)],
        [ask(short, 12, id), ask(text[:20], 12, f"{id}@1")],
        [ask(text + middle, 1, mem_capture=name, mem_replace=1)],
        [ask(short, 12, id), ask(short, 12, f"{id}@1")],
    ]
    result = run(b.model, rounds, memory=b.section(capture="own"), **options)
    assert tokens(result) == [b.generate(text), b.generate(middle)], "keeping a prompt changes no answer"
    assert result["rounds"][0][0]["memory"]["capture"] == {"id": f"{id}@1"}
    assert tokens(result, 1) == [b.generate(text + short), b.generate(text + text[:20])]
    assert result["rounds"][2][0]["memory"]["capture"] == {"id": f"{id}@2"}
    assert tokens(result, 3) == [b.generate(text + middle + short), b.generate(text + short)]
    with Bank.open(b.prefixes) as bank:
        assert bank.load(f"{id}@2").tokens == bank.resolve(id, any_tenant=True).tokens == len(text + middle)
    assert not list((b.prefixes / "incoming").iterdir()), "the ranks' files are gone"
    return result


def a_bank_of_another_dtype_is_read_and_written_with_a_warning(b: MemoryBench, run: Run, **options: Any) -> None:
    """An fp32 bank on an engine that computes in bf16, as vLLM's "auto" does with an fp32 checkpoint.

    The text is one whose answer bf16 does not change, on either engine.
    """
    short, text, id = PROMPTS[0], b.texts["alpha"], "capture:half"
    rounds = [[ask(text, mem_capture="half"), ask(short, 12, "alpha")], [ask(short, 12, id)]]
    result = run(b.model, rounds, memory=b.section(capture="own"), dtype="bfloat16", **options)
    assert result["rounds"][0][0]["memory"]["capture"] == {"id": f"{id}@1"}
    assert [tokens(result)[1], *tokens(result, 1)] == [b.after(short, "alpha")] * 2
    assert result["output"].count("holds float32, the engine computes in bfloat16") == 1
    with Bank.open(b.prefixes) as bank:
        block = bank.load(f"{id}@1")
    (exact,) = TransformersEncoder(b.oracle).encode([text])
    for found, expected in ((block.keys, exact.keys), (block.values, exact.values)):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max(), "what a bf16 engine computed"


def prompts_captured_at_once_are_kept_apart(b: MemoryBench, run: Run, **options: Any) -> None:
    texts = [tokens_of(60 + i, 20 + 13 * i) for i in range(6)]
    rounds = [
        [ask(text, 1 + 5 * i, mem_capture=f"many-{i}") for i, text in enumerate(texts)],
        [ask(PROMPTS[0], 12, f"capture:many-{i}") for i in range(6)],
    ]
    result = run(b.model, rounds, memory=b.section(capture="own"), **options)
    assert tokens(result, 1) == [b.generate(text + PROMPTS[0]) for text in texts]


def a_capture_of_the_wrong_tokens_would_be_seen(b: MemoryBench, run: Run, tamper: str, **options: Any) -> None:
    text = tokens_of(51, 45)
    rounds = [[ask(text, mem_capture="wrong")], [ask(PROMPTS[0], 12, "capture:wrong")]]
    result = run(b.model, rounds, memory=b.section(capture="own"), tamper=tamper, **options)
    assert result["rounds"][0][0]["memory"]["capture"] == {"id": "capture:wrong@1"}
    assert tokens(result, 1) != [b.generate(text + PROMPTS[0])]


def smaller_pages_are_read_as_what_they_hold(b: MemoryBench, run: Run, pool_dtype: str, **options: Any) -> None:
    """Pages of 8 bits and their scales, against transformers with the same entries in the same precision."""
    short, middle, long, edge = PROMPTS
    asked = [(short, "alpha"), (short, "beta"), (middle, "alpha"), (long, "beta"), (edge, "delta")]
    batch = [ask(prompt, 40, id) for prompt, id in asked]
    result = run(b.model, [[*batch, ask(edge)]], memory=b.section(pool_dtype=pool_dtype), **options)
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[pool_dtype]
    expected = [b.through_pages(prompt, id, dtype, 40) for prompt, id in asked]
    assert tokens(result) == [*expected, b.generate(edge)]
    exact = [b.after(prompt, id, count=40) for prompt, id in asked]
    assert [e != x for e, x in zip(expected, exact, strict=True)][:4] == [True] * 4, "the precision shows"


def answer(
    bench: Bench, m: MemoryBench, prompt: list[int], *ids: str, fresh: bool = True, count: int = 12
) -> list[int]:
    """What a model with δ-mem or a LoRA of its own says with entries attached."""
    if fresh:
        bench.forget()
    with Bank.open(m.prefixes) as bank, read_plans(bench.oracle, bank, [[Attachment(f"{i}@1") for i in ids]]):
        return bench.generate(prompt, count)


def both_memories_and_a_session_at_once(m: MemoryBench, bench: Bench, run: Run, page: int, **options: Any) -> None:
    short, middle, long, _ = PROMPTS
    rounds = [
        [
            ask(short, 12, "alpha"),
            ask(middle),
            ask(long, 12, "beta"),
            ask(middle, 12, "alpha", mem_session="s"),
        ],
        [ask(short, 12, "beta", mem_session="s"), ask(long, 12, "beta")],
    ]
    result = run(m.model, rounds, memory={**bench.memory, **m.section()}, **options)
    first = [answer(bench, m, p, *ids) for p, ids in ((short, ["alpha"]), (middle, []), (long, ["beta"]))]
    assert tokens(result, 0) == [*first, answer(bench, m, middle, "alpha")]
    assert tokens(result, 1)[0] == answer(bench, m, short, "beta", fresh=False), "the session's state went on"
    assert tokens(result, 1)[1] == first[2] and cached(result, 1)[1] == whole_pages(long, page)


def lora_and_memory_together(m: MemoryBench, lora_bench: Bench, run: Run, **options: Any) -> None:
    short, _, long, _ = PROMPTS
    lora = str(lora_bench.lora)
    batch = [{**ask(short, 12, "alpha"), "lora": lora}, {**ask(long, 12, "beta"), "lora": lora}]
    result = run(m.model, [batch], memory={**lora_bench.memory, **m.section()}, **options)
    assert tokens(result) == [answer(lora_bench, m, short, "alpha"), answer(lora_bench, m, long, "beta")]


def retrieval_for_every_chunk_of_the_prompt_and_of_the_answer(m: MemoryBench, run: Run, **options: Any) -> None:
    prompt = reference(3) + reference(9)[:20] + reference(14) + tokens_of(1, 9)
    section = m.section(m.references, retrieval={"top_k": 2, "every": 32})
    batch = [ask(prompt, 80), ask(prompt, 10, mem_top_k=0), ask(PROMPTS[0], 70, mem_top_k=1), ask(prompt, 10, "ref-5")]
    result = run(m.model, [batch, batch[:1]], memory=section, **options)
    expected, plan = m.retrieving(prompt, 80, top_k=2, every=32)
    short, short_plan = m.retrieving(PROMPTS[0], 70, top_k=1, every=32)
    assert tokens(result) == [expected, m.generate(prompt, 10), short, m.with_plan(prompt, [Attachment("ref-5@1")], 10)]
    assert tokens(result, 1) == [expected] and cached(result, 1)[0] > 0
    assert seen(result["rounds"][0][0]) == [(a.ref, a.first, a.end) for a in plan]
    assert seen(result["rounds"][0][2]) == [(a.ref, a.first, a.end) for a in short_plan]
    assert "ref-3@1" in {a.ref for a in plan if a.first == 0}, "a chunk finds the reference that it quotes"


def a_full_pool_ends_the_refreshes_and_not_the_answer(m: MemoryBench, run: Run, **options: Any) -> None:
    """Three pages and two requests: whoever holds some does not wait for more, or both would wait for ever."""
    page = 2 * 8 * 2 * 32 * 4  # KV heads, tokens, K and V, head size, fp32; one layer
    section = m.section(m.references, pool_gib=3.5 * page / 2**30, retrieval={"top_k": 2, "every": 16})
    prompts = [reference(3)[:16], reference(9)[:16]]
    greedy = reference(3) + reference(9) + reference(14)
    rounds = [[ask(p, 60) for p in prompts], [ask(greedy, 8, mem_top_k=64), ask(PROMPTS[0], mem_top_k=0)]]
    result = run(m.model, rounds, memory=section, **options)
    more, plain = result["rounds"][1]  # what is asked for takes dozens of pages in one step
    assert "did not fit" in more["memory"]["retrieval"] and tokens(result, 1)[1] == m.generate(PROMPTS[0])
    assert more["tokens"] == m.with_plan(greedy, [Attachment(*p) for p in seen(more)], 8) and plain["tokens"]
    for prompt, found in zip(prompts, result["rounds"][0], strict=True):
        assert found["tokens"] == m.with_plan(prompt, [Attachment(*p) for p in seen(found)], 60)
    assert any("no free pages" in found["memory"].get("refresh", "") for found in result["rounds"][0])
