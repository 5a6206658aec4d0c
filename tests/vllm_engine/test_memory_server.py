"""Explicit memory over real HTTP: ids, tenants, captures, retrieval, streams; a server that survives its requests."""

from __future__ import annotations

import pytest

from tests.support.memory_bench import SECRET, MemoryBench, make_memory_bench, reference, tokens_of
from tests.support.memory_scenarios import PROMPTS, three_pages
from tests.support.memory_server_scenarios import *  # noqa: F403
from tests.support.models import tiny_tokenizer
from tests.support.server import at_once, bad_fields_are_400, ids, whole
from tests.vllm_engine.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def server(memory_bench, start_server) -> Server:
    """The bank of whole texts behind three pages: whoever wants another entry waits for its turn. It starts as users
    start it, its worker is spawned and loads the plugin itself."""
    flags = ["--enable-scale-out"]  # for the route of tokens
    return start_server(memory_bench.model, three_pages(memory_bench, capture="own"), flags, fresh=True)


def test_memory_over_http_and_what_was_read_is_in_the_answer(server, memory_bench):
    b, (short, middle, *_) = memory_bench, PROMPTS
    assert server.tokens(short, fields=ids("alpha")) == b.after(short, "alpha")
    assert server.tokens(short) == b.after(short)
    response = server.complete(middle, fields=ids("beta"))
    assert response.json()["choices"][0]["token_ids"] == b.after(middle, "beta")
    assert server.report(response) == {"references": whole("beta")}
    assert response.json()["usage"]["prompt_tokens"] == len(middle), "memory is no prompt"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_ids": ["alpha", "nobody"]}, "nobody"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": [SECRET], "mem_tenant": "other"}, SECRET),
        ({"mem_ids": ["delta"]}, "need 7 memory pages"),
        ({"mem_ids": ["a b"]}, "is no id"),
        ({"mem_capture": "x@1"}, "mem_capture"),
    ],
)
def test_bad_fields_are_400_that_name_the_id(server, fields, message):
    bad_fields_are_400(server, PROMPTS[0], fields, message)


def test_fault28_an_entry_that_cannot_be_read_fails_its_request_alone(server, memory_bench):
    b, shards, text = memory_bench, memory_bench.prefixes / "shards", tokens_of(90, 20)
    server.tokens(text, 2, {"mem_capture": "far"})  # lies in a file of its own, which nobody has opened yet
    shards.rename(shards.with_name("away"))
    try:
        failed = server.complete(PROMPTS[1], fields=ids("capture:far"))
        assert failed.status_code == 500 and "capture:far@1" in failed.text and "missing" in failed.text
        streamed = list(server.events(PROMPTS[1], 12, ids("capture:far")))
        assert "missing" in str(streamed[-1]) and not any("choices" in event for event in streamed)
        assert server.tokens(PROMPTS[1]) == b.after(PROMPTS[1]), "others go on"
    finally:
        shards.with_name("away").rename(shards)
    after = b.generate(text + PROMPTS[1])
    assert server.tokens(PROMPTS[1], fields=ids("capture:far")) == after, "the next one tries again"


@pytest.mark.parametrize("kind", ["plain", "streamed", "chat"])
def test_fault04_every_answer_of_several_comes_whole(server, memory_bench, kind):
    b, prompt, several = memory_bench, PROMPTS[1], {"n": 3, "temperature": 1.0, "top_k": 1}
    if kind == "plain":
        found = server.complete(prompt, fields=ids("beta"), **several).json()
        assert [c["token_ids"] for c in found["choices"]] == [b.after(prompt, "beta")] * 3
        assert server.report(server.complete(prompt, fields=ids("beta"), **several)) == {"references": whole("beta")}
    elif kind == "chat":
        found = server.chat("who?", 12, fields=ids("beta"), ignore_eos=True, **several).json()
        assert len({c["message"]["content"] for c in found["choices"]}) == 1 and len(found["choices"]) == 3
    else:
        *parts, found = server.events(prompt, 12, ids("beta"), stream_options={"include_usage": True}, **several)
        choices = [c for part in parts for c in part["choices"]]
        tokens = {i: [t for c in choices if c["index"] == i for t in c["token_ids"] or ()] for i in range(3)}
        assert tokens == dict.fromkeys(range(3), b.after(prompt, "beta"))
        assert sorted(c["index"] for c in choices if c["finish_reason"]) == [0, 1, 2]
    assert found["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": "x", "mem_ids": ["alpha"]}, "belongs into vllm_xargs"),
        ("/v1/chat/completions", {"messages": [], "custom_params": {"mem_ids": []}}, "belongs into vllm_xargs"),
        ("/v1/responses", {"input": "x", "mem_ids": ["alpha"]}, "belongs into vllm_xargs"),
        ("/v1/messages", {"messages": [], "max_tokens": 2, "mem_ids": ["alpha"]}, "belongs into vllm_xargs"),
        ("/v1/responses", {"input": "x", "vllm_xargs": {"mem_ids": ["nobody"]}}, "nobody"),
        (
            "/v1/messages",
            {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 2,
                "vllm_xargs": {"mem_ids": ["nobody"]},
            },
            "nobody",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [5], "sampling_params": {"extra_args": {"mem_ids": ["nobody"]}}},
            "nobody",
        ),
        ("/inference/v1/generate", {"token_ids": [5], "vllm_xargs": {"mem_ids": []}}, "sampling_params.extra_args"),
        ("/tokenize", {"prompt": "x", "vllm_xargs": {"mem_ids": []}}, "/tokenize has no memory"),
        (
            "/v1/completions",
            {"prompt": "x", "use_beam_search": True, "n": 2, "vllm_xargs": {"mem_ids": ["alpha"]}},
            "mem_ids: beam search",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "use_beam_search": 1,
                "n": 2,
                "vllm_xargs": {"mem_bogus": 1},
            },
            "mem_bogus: beam search",
        ),
    ],
)
def test_fault06_no_route_drops_a_field(server, path, body, message):
    for stream in (False, True):
        response = server.http.post(path, json={"model": "m", "stream": stream, **body})
        assert response.status_code == 400 and message in response.text, response.text


def test_fault06_beam_search_without_fields_is_served(server):
    response = server.complete(PROMPTS[0], 4, use_beam_search=True, n=2)
    assert response.status_code == 200 and len(response.json()["choices"]) == 2, response.text


@pytest.fixture(scope="module")
def retrieving(memory_bench, start_server) -> Server:
    """The bank of references; new ones after every 32 tokens."""
    section = memory_bench.section(memory_bench.references, retrieval={"top_k": 2, "every": 32})
    return start_server(memory_bench.model, section)


def test_retrieval_over_http_streams_one_answer(retrieving, memory_bench):
    b, server, prompt = memory_bench, retrieving, reference(3) + reference(9)
    expected, _ = b.retrieving(prompt, 70, top_k=2, every=32)
    assert [t for part in server.stream(prompt, 70) for t in part] == expected
    assert at_once(4, lambda _: server.tokens(prompt, 70)) == [expected] * 4
    assert server.tokens(prompt, fields={"mem_top_k": 0}) == b.generate(prompt)
    assert server.report(server.chat("who?", 40))["references"]
    assert server.complete(prompt, 12, n=2, temperature=1.0).status_code == 200
    assert server.metric("mem_triton:refresh_off_total") > 0


def test_fault05_text_is_that_of_the_tokens_across_refreshes(retrieving):
    """The tiny model says bytes, and few of them are characters of their own."""
    decode = tiny_tokenizer().decode
    for seed in range(4):
        asked = {"temperature": 1.0, "seed": seed, "allowed_token_ids": list(range(150, 260))}
        plain = retrieving.complete(PROMPTS[1], 70, **asked).json()["choices"][0]
        assert len(plain["token_ids"]) == 70 and plain["text"] == decode(plain["token_ids"])
        choices = [c for part in retrieving.events(PROMPTS[1], 70, **asked) for c in part["choices"]]
        assert [t for c in choices for t in c["token_ids"] or ()] == plain["token_ids"]
        assert "".join(c["text"] for c in choices) == plain["text"]


def test_fault06_bad_words_hold_across_what_would_have_been_a_cut(retrieving):
    """Of two letters one may not follow the other: the answer stays in one piece, and its report says why."""
    first, second = tiny_tokenizer().encode("AB", add_special_tokens=False)
    asked = {"temperature": 1.0, "seed": 1, "allowed_token_ids": [first, second], "bad_words": ["AB"]}
    answer = retrieving.complete(PROMPTS[1], 100, **asked)
    assert "AB" not in answer.json()["choices"][0]["text"]
    assert "bad_words" in retrieving.report(answer)["refresh"]
