"""Explicit memory over real HTTP: ids, tenants, captures, retrieval, streams; a server that survives its requests."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import httpx
import pytest

from tests.support.memory_bench import SECRET, MemoryBench, make_memory_bench, reference, tokens_of
from tests.support.memory_scenarios import PROMPTS, three_pages
from tests.vllm_engine.server import Server, memory_flags

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def memory_bench(tmp_path_factory) -> MemoryBench:
    return make_memory_bench(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def server(memory_bench, tmp_path_factory) -> Iterator[Server]:
    """The bank of whole texts behind three pages: whoever wants another entry waits for its turn."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    server = Server(str(memory_bench.model), str(log), memory_flags(three_pages(memory_bench)))
    try:
        yield server.wait()
    finally:
        server.stop()


def ids(*names: str, **more) -> dict:
    return {"vllm_xargs": {"mem_ids": list(names), **more}}


def test_memory_over_http_and_what_was_read_is_in_the_answer(server, memory_bench):
    b, (short, middle, *_) = memory_bench, PROMPTS
    assert server.tokens(short, **ids("alpha")) == b.after(short, "alpha")
    assert server.tokens(short) == b.after(short)
    response = server.complete(middle, **ids("beta")).json()
    assert response["choices"][0]["token_ids"] == b.after(middle, "beta")
    (part,) = response["kv_transfer_params"]["mem_triton"]["references"]
    assert part == {"first_token": 0, "end_token": None, "entries": [{"id": "beta@1"}]}
    assert response["usage"]["prompt_tokens"] == len(middle), "memory is no prompt"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"mem_ids": ["alpha", "nobody"]}, "nobody"),
        ({"mem_ids": [SECRET]}, SECRET),
        ({"mem_ids": [SECRET], "mem_tenant": "other"}, SECRET),
        ({"mem_ids": ["delta"]}, "need 7 memory pages"),
        ({"mem_ids": ["a b"]}, "is no id"),
        ({"mem_capture": "x@1"}, "mem_capture"),
    ],
)
def test_bad_words_are_400_that_name_the_id(server, xargs, message, stream):
    response = server.complete(PROMPTS[0], vllm_xargs=xargs, stream=stream)
    assert response.status_code == 400 and message in response.text
    assert server.http.get("/health").status_code == 200


def test_many_requests_share_three_pages(server, memory_bench):
    b, names = memory_bench, ("alpha", "beta", "gamma")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: server.tokens(PROMPTS[i % 4], **ids(names[i % 3])), range(12)))
    assert answers == [b.after(PROMPTS[i % 4], names[i % 3]) for i in range(12)]
    assert server.metric("mem_triton:pool_evictions_total") > 0


def test_a_tenant_reads_its_own(server, memory_bench):
    assert server.tokens(PROMPTS[0], **ids(SECRET, mem_tenant="acme")) == memory_bench.after(PROMPTS[0], "alpha")


def test_a_request_that_waits_for_pages_delays_nobody_and_a_client_that_leaves_frees_them(server, memory_bench):
    b = memory_bench
    plain, alpha, gamma = (b.after(PROMPTS[1], *names) for names in ((), ("alpha",), ("gamma",)))
    holding = server.stream(PROMPTS[0], 3900, **ids("alpha"))
    next(holding)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.tokens, PROMPTS[1], **ids("gamma"))
        assert server.tokens(PROMPTS[1]) == plain, "plain requests go on"
        assert server.tokens(PROMPTS[1], **ids("alpha")) == alpha, "and so do hits"
        assert not waiting.done(), waiting.exception() or waiting.result()
        holding.close()
        assert waiting.result(60) == gamma


def test_a_waiting_client_that_leaves_is_forgotten(server, memory_bench):
    holding = server.stream(PROMPTS[0], 3000, **ids("alpha"))
    next(holding)
    body = {"model": "m", "prompt": PROMPTS[1], "max_tokens": 4, **ids("gamma")}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=1)
    holding.close()
    assert server.tokens(PROMPTS[1], **ids("beta")) == memory_bench.after(PROMPTS[1], "beta")


def test_capture_over_http(server, memory_bench):
    b, text = memory_bench, tokens_of(60, 37)
    response = server.complete(text, 3, vllm_xargs={"mem_capture": "http-note", "mem_tenant": "acme"}).json()
    assert response["kv_transfer_params"]["mem_triton"]["capture"] == {"id": "http-note@1"}
    assert server.tokens(PROMPTS[0], **ids("http-note", mem_tenant="acme")) == b.generate(text + PROMPTS[0])
    assert server.complete(PROMPTS[0], **ids("http-note")).status_code == 400, "it is acme's"
    assert server.metric("mem_triton:captures_total") == 1


def test_captures_that_end_together_are_all_kept(server, memory_bench):
    texts = [tokens_of(70 + i, 16 + i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: server.tokens(texts[i], 2, vllm_xargs={"mem_capture": f"together-{i}"}), range(8)))
    for i in (0, 3, 7):
        assert server.tokens(PROMPTS[0], **ids(f"together-{i}")) == memory_bench.generate(texts[i] + PROMPTS[0])


def test_retrieval_over_http_streams_one_answer(memory_bench, tmp_path):
    b, prompt = memory_bench, reference(3) + reference(9)
    section = b.section(b.references, retrieval={"top_k": 2, "every": 32})
    server = Server(str(b.model), str(tmp_path / "server.log"), memory_flags(section))
    try:
        server.wait()
        expected, _ = b.retrieving(prompt, 70, top_k=2, every=32)
        assert [t for part in server.stream(prompt, 70) for t in part] == expected
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: server.tokens(prompt, 70), range(4)))
        assert answers == [expected] * 4
        assert server.tokens(prompt, vllm_xargs={"mem_top_k": 0}) == b.generate(prompt)
        chat = {"model": "m", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 40, "temperature": 0}
        answer = server.http.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200 and answer.json()["kv_transfer_params"]["mem_triton"]["references"]
        assert server.complete(prompt, 12, n=2, temperature=1.0).status_code == 200
        assert server.metric("mem_triton:refresh_off_total") > 0
    finally:
        server.stop()
